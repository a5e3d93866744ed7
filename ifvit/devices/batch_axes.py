"""Sums over the whole batch, for code that sees the pairs of one device.

A training step runs its loss on each device separately (`training.step.train_step`). A sum, a count or a BatchNorm
statistic of the global batch must then be added up over the devices. Code that sees the whole batch at once, as in
evaluation, has nothing to add; the same functions then return their input.
"""

import jax


def batch_axes() -> tuple[str, ...]:
    """The mesh axes that the code being traced is mapped over. There are none where it sees the whole batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(mesh.axis_names[i] for i, t in enumerate(mesh.axis_types) if t == jax.sharding.AxisType.Manual)


def over_batch(x):
    """The sum of every device's `x`."""
    axes = batch_axes()
    return jax.lax.psum(x, axes) if axes else x
