"""How many floating-point operations a second a device can do at most, by its maker's data sheet."""

import re

# TFLOP/s of one device as JAX counts them, dense, in matrix products: (name, float32, bfloat16). JAX multiplies float32
# in TF32 on NVIDIA's GPUs from Ampere on, and in one pass of bfloat16 on TPUs, unless it is asked for more.
# NVIDIA: the data sheets of V100, T4, A10, A100, L4, L40S, H100, H200 and HGX B200; where they give figures with
# sparsity alone, half of these. Google: cloud.google.com/tpu/docs, the page of each version; a device of v2 and v3 is
# half a chip. A longer name stands before a shorter one that it contains.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("V100", 15.7, None),
    ("T4", 8.1, None),
    ("A10", 62.5, 125.0),
    ("A100", 156.0, 312.0),
    ("L4", 60.0, 121.0),
    ("L40S", 183.0, 362.0),
    ("H100 PCIe", 378.0, 756.0),
    ("H100 NVL", 418.0, 835.0),
    ("H100", 494.5, 989.0),
    ("H200 NVL", 418.0, 835.0),
    ("H200", 494.5, 989.0),
    ("B200", 1125.0, 2250.0),
    ("TPU v2", 22.5, 22.5),
    ("TPU v3", 61.5, 61.5),
    ("TPU v4", 275.0, 275.0),
    ("TPU v5 lite", 197.0, 197.0),
    ("TPU v5e", 197.0, 197.0),
    ("TPU v5p", 459.0, 459.0),
    ("TPU v5", 459.0, 459.0),  # what JAX calls a v5p
    ("TPU v6 lite", 918.0, 918.0),
    ("TPU v6e", 918.0, 918.0),
)


def peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of a device by what JAX calls it (`Device.device_kind`), in products of float32 or bfloat16.

    None where it is not known: of CPUs, of a part of a GPU (MIG), of a dtype that the device has no units for.
    """
    if "MIG" in device_kind:
        return None
    for name, float32, bfloat16 in PEAKS:
        if re.search(rf"\b{name}\b", device_kind):
            found = {"float32": float32, "bfloat16": bfloat16}.get(dtype)
            return None if found is None else found * 1e12
    return None
