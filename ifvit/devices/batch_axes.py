"""What code that sees one device's pairs needs of the others': sums over the whole batch.

A training step maps its loss over the devices (`training.step.train_step`). There a sum, a count or a
BatchNorm statistic of the global batch is a sum over the mesh axes that the code is mapped over; code that sees
the whole batch at once, as in evaluation, has no such axes, and nothing to add.
"""

import jax


def batch_axes() -> tuple[str, ...]:
    """The mesh axes that the code being traced is mapped over; none where it sees the whole batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(mesh.axis_names[i] for i, t in enumerate(mesh.axis_types) if t == jax.sharding.AxisType.Manual)


def over_batch(x):
    """The sum of every device's `x`."""
    axes = batch_axes()
    return jax.lax.psum(x, axes) if axes else x
