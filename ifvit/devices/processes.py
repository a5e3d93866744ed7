"""What the processes of a run tell each other outside the devices, through JAX's coordination service.

Every process calls the same functions in the same order. A run of one process tells itself.
"""

from collections import Counter
from collections.abc import Callable

from cluster.host import Host
from ifvit.errors import UserError

DAY = 86_400_000  # ms: somebody may be decoding many prints; one that has died is noticed by its heartbeat

_told: Counter[str] = Counter()


def exchange(what: str, value: str, timeout_ms: int = DAY) -> list[str]:
    """Every process's `value`, in the order of the processes. Raises where one has not come in time."""
    import jax

    if jax.process_count() == 1:
        return [value]
    from orbax.checkpoint import multihost

    client = multihost.get_jax_distributed_client()
    _told[what] += 1
    key = f"ifvit/{what}/{_told[what]}"
    client.key_value_set(f"{key}/{jax.process_index():08d}", value)
    client.wait_at_barrier(key, timeout_ms)
    return [said for _, said in sorted(client.key_value_dir_get(key))]


def require_same(what: str, value: str, name: str, remedy: str) -> None:
    """UserError on all processes, with the names of two, where `value` is not the same on all."""
    names, values = exchange(f"{what} of", name), exchange(what, value)
    other = next((n for n, v in enumerate(values) if v != values[0]), None)
    if other is not None:
        raise UserError(
            f"{what} differs between {names[0]} ({values[0]}) and {names[other]} ({values[other]}); {remedy}"
        )


def together(what: str, call: Callable, host: Host):
    """`call()` on every process, on the first of each host before the others; a UserError on one is one on all, and
    says where."""
    result, problem = None, ""
    for turn in (True, False):
        if host.first_here == turn:
            try:
                result = call()
            except UserError as e:
                problem = f"{host.name}: {e}" if host.name else str(e)
        said = exchange(what, problem)
        if any(said):
            raise UserError(next(filter(None, said)))
    return result
