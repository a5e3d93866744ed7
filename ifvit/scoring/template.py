"""Templates of prints (`models.template`): unit vectors, which can be stored and compared by their cosine."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from ifvit.bar import bar
from ifvit.config import Settings
from ifvit.data.loader import print_rows
from ifvit.data.prepare import Prints
from ifvit.devices.sharding import fetch, make_mesh, put_whole_batch
from ifvit.models.cells import cell_mask
from ifvit.models.networks import Network
from ifvit.models.template import Template, templates
from ifvit.pixels.alone import own_prints
from ifvit.pixels.geometry import exact


def description(net: Network, config: Settings) -> Callable:
    """(params, batch_stats, prints, degrees) -> what Module 1's ResNet says of each cell (N L D), foreground (N L).

    `prints` has `canvas` and `mask`; each is turned by so many degrees.
    """

    @exact
    def describe(params, batch_stats, prints, degrees):
        alone = own_prints(prints["canvas"], prints["mask"], degrees, config)
        x, _ = net.apply(params, batch_stats, alone.image, train=False, method="described")
        return x, cell_mask(alone.mask)

    return describe


def template_of(net: Network, config: Settings) -> Callable:
    """(params, batch_stats, template, prints, degrees (R,)) -> templates (N R E)."""
    describe = description(net, config)

    @exact
    def embed(params, batch_stats, template, prints, degrees):
        def turned(angle):
            return templates(*describe(params, batch_stats, prints, angle), template)

        return jnp.moveaxis(jax.lax.map(turned, degrees), 0, 1)

    return embed


def embed_prints(
    how: Callable, state: tuple, prints: Prints, batch_size: int, turns: tuple[float, ...] = (0.0,)
) -> Float32[np.ndarray, "N R E"]:
    """What `template_of`, jitted as `how`, tells of the prints, at least one; `state` is what it takes first."""
    degrees, found = np.asarray(turns, np.float32), []
    count = len(prints.prints)
    with bar("templates", count, "print") as shown:
        for rows, real in print_batches(prints, np.arange(count), batch_size):
            found.append(fetch(how(*state, rows, degrees))[:real])
            shown.update(real)
    return np.concatenate(found)


def print_batches(
    prints: Prints, numbers: Int[np.ndarray, " N"], batch_size: int, model_parallel: int = 1
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Prints by their numbers in batches of one size on the devices, the last filled up: (batch, how many count)."""
    if jax.process_count() > 1 or jax.default_backend() != "cpu":
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    mesh = make_mesh(batch_size, model_parallel)
    for at in range(0, len(numbers), batch_size):
        some = numbers[at : at + batch_size]
        filled = np.concatenate([some, np.repeat(some[-1:], batch_size - len(some))])
        yield put_whole_batch(print_rows(prints, filled), mesh), len(some)


def as_template(tree: dict) -> Template:
    """A checkpoint's."""
    return Template(**tree)
