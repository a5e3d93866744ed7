"""Messages between the processes of a run, through JAX's coordination service and not through the devices.

Every process calls the same functions in the same order. A single process gets its own messages.
"""

from collections import Counter
from collections.abc import Callable

from cluster.host import Host
from ifvit.errors import UserError

# In ms. Another process may be decoding prints for a long time; the heartbeat finds one that has died.
DAY = 86_400_000

_told: Counter[str] = Counter()


def exchange(what: str, value: str, timeout_ms: int = DAY) -> list[str]:
    """Every process's `value`, in the order of the processes. Raises where a process does not come in time."""
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
    """UserError on all processes where `value` is not the same on all; it names two that differ."""
    names, values = exchange(f"{what} of", name), exchange(what, value)
    other = next((n for n, v in enumerate(values) if v != values[0]), None)
    if other is not None:
        raise UserError(
            f"{what} differs between {names[0]} ({values[0]}) and {names[other]} ({values[other]}); {remedy}"
        )


def together(what: str, call: Callable, host: Host):
    """Calls `call()` on every process; on each host the first process goes before the others.

    A UserError on one process is raised on all, and names the process.
    """
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
