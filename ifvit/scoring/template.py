"""Templates: unit vectors of prints by themselves, which can be stored and compared by their cosine."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from ifvit.bar import bar
from ifvit.config import Settings
from ifvit.data.loader import print_rows
from ifvit.data.prepare import Prints
from ifvit.devices.sharding import fetch, make_mesh, put_whole_batch
from ifvit.models.networks import Network
from ifvit.pixels.alone import own_prints
from ifvit.pixels.geometry import exact


def template_of(net: Network, config: Settings) -> Callable:
    """(params, batch_stats, prints, degrees (R,)) -> templates (N R E), foreground's share of the window (N,).

    `prints` has `canvas` and `mask`. The share is that of the print as it is given.
    """

    @exact
    def embed(params, batch_stats, prints, degrees):
        def turned(angle):
            alone = own_prints(prints["canvas"], prints["mask"], angle, config)
            return net.apply(params, batch_stats, alone, train=False, method="template")[0]

        upright = own_prints(prints["canvas"], prints["mask"], jnp.float32(0), config).mask
        return jnp.moveaxis(jax.lax.map(turned, degrees), 0, 1), upright.mean((1, 2), dtype=jnp.float32)

    return embed


def embed_prints(
    how: Callable,
    state: tuple,
    prints: Prints,
    numbers: Sequence[int],
    batch_size: int,
    turns: tuple[float, ...] = (0.0,),
    model_parallel: int = 1,
) -> tuple[Float32[np.ndarray, "N R E"], Float32[np.ndarray, " N"]]:
    """What `template_of`, jitted as `how`, tells of the prints with these numbers, at least one, in their order."""
    if jax.process_count() > 1 or jax.default_backend() != "cpu":
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    mesh = make_mesh(batch_size, model_parallel)
    degrees, found = np.asarray(turns, np.float32), []
    with bar("templates", len(numbers), "print") as shown:
        for at in range(0, len(numbers), batch_size):
            some = np.asarray(numbers[at : at + batch_size], np.int32)
            filled = np.concatenate([some, np.repeat(some[-1:], batch_size - len(some))])
            rows = put_whole_batch(print_rows(prints, filled), mesh)
            found.append([x[: len(some)] for x in fetch(how(*state, rows, degrees))])
            shown.update(len(some))
    return tuple(np.concatenate(x) for x in zip(*found))
