"""What the tests tell XLA: their programs run for milliseconds, and take longer to compile."""

from importlib.metadata import version

# In JAX 0.10 the code that fusions are compiled by takes half of a compilation's time. Later ones have no other.
QUICK = ("--xla_cpu_use_fusion_emitters=false",) if version("jax").startswith("0.10.") else ()


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many devices, which JAX must not have been imported in."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *QUICK))
