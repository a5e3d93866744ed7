"""Says in a sentence what an error of JAX's runtime means, and what a user can do about it.

Only known errors are explained. Any other is a defect, or new, and its traceback is worth having.
"""

import logging
import os
import re
from dataclasses import dataclass

GPU_LIBRARIES = (
    "The GPU's libraries (CUDA, cuDNN) or its driver do not fit this jaxlib, or another process has the GPU's memory. "
    "Look with nvidia-smi who is on the GPU and which driver it has; then install the extra `cuda` in a fresh "
    "environment, with LD_LIBRARY_PATH unset"
)
DRIVER = (
    "The NVIDIA driver is too old for this jaxlib. Update the driver (nvidia-smi shows it), or install a jax whose "
    "CUDA it knows"
)
KERNELS = (
    "This jaxlib has no programs for this GPU, which is too old or too new for it. Use another GPU, or "
    "JAX_PLATFORMS=cpu"
)
NCCL = (
    "The GPUs cannot talk to each other by NCCL. NCCL_DEBUG=INFO tells why; often NCCL_SOCKET_IFNAME has to name the "
    "network of the hosts, or the container's /dev/shm is too small (docker run --shm-size=8g)"
)
PEERS = (
    "Another process of the run is gone or cannot be reached. The other hosts' logs say why; every port has to be open "
    "between the hosts, and no proxy between them"
)
BUSY = "Another process has the {}. End it (`{}` shows it), wait for its end, or give this one another with {}"
GPU_BUSY = BUSY.format("GPU", "nvidia-smi", "CUDA_VISIBLE_DEVICES")
TPU_BUSY = BUSY.format("TPU", "sudo lsof -w /dev/accel* /dev/vfio/*", "TPU_VISIBLE_CHIPS")
BROKEN = (
    "The {} has failed in the midst of its work. The same command goes on from the last checkpoint; if it fails again, "
    "look into the machine's log (`dmesg`) and restart the machine, or take another"
)

# Tried in this order: a pattern of the message, what it means, and whether another start may go well.
KNOWN = [
    (r"NCCL|nccl[A-Z]", NCCL, True),
    (
        r"driver version is insufficient|InsufficientDriver|driver on your system is too old|UNSUPPORTED_PTX_VERSION"
        r"|COMPAT_NOT_SUPPORTED|SYSTEM_DRIVER_MISMATCH|forward compatibility was attempted",
        DRIVER,
        False,
    ),
    (r"TPU is already in use|libtpu.* already in use|/dev/(accel|vfio).* busy", TPU_BUSY, False),
    (
        r"CUDA_ERROR_DEVICE_UNAVAILABLE|devices? (is|are) (all )?busy or unavailable|device\(s\) is/are busy",
        GPU_BUSY,
        False,
    ),
    (
        r"CUDA_ERROR_(ILLEGAL|LAUNCH|ECC|MISALIGNED|ASSERT|HARDWARE|NVLINK|CONTAINED|EXTERNAL_DEVICE)|uncorrectable ECC"
        r"|illegal memory access|unspecified launch failure",
        BROKEN.format("GPU"),
        True,
    ),
    (r"Core halted|TPU.*(halted|unhealthy|lost)|Slice health", BROKEN.format("TPU"), True),
    (r"no kernel image|NO_BINARY_FOR_GPU", KERNELS, False),
    (
        r"(?i)\bdnn (library|support)|cudnn|cublas|cufft|cusolver|cusparse|gpu(solver|blas)|blas support|ptxas"
        r"|libdevice|cuInit|CUDA_ERROR|cudaError|CUDA (error|runtime|driver|version)",
        GPU_LIBRARIES,
        False,
    ),
    (
        r"(?i)gloo|coordination ?service|barrier|heartbeat|PjRT_Client_Connect|jax_worker"
        r"|connection (refused|reset|closed)|socket closed|connect to (all addresses|remote host)"
        r"|connect(\(\))? time[d -]*out",
        PEERS,
        True,
    ),
]
OF_PEERS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")  # these mean PEERS where no pattern fits
STATUS = rf"({'|'.join(OF_PEERS)}|FAILED_PRECONDITION|INTERNAL|UNKNOWN|NOT_FOUND|UNIMPLEMENTED)\b"

NO_DEVICES = re.compile(  # the name of a platform, or of a plugin's file, and the reason
    r"Unable to initialize backend '([^']*)': ?(.*)|Backend '(.*)' failed to initialize: (.*)"
    r"|Unknown backend:? '?(\w+)(.*)|Failed to open (\S+): (.*shared object.*)",
    re.DOTALL,
)
VISIBLE = {"tpu": ("TPU_VISIBLE_CHIPS",)}  # variables that hide devices of a platform
GPUS_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # platform -> this project's extra


@dataclass(frozen=True)
class Explained:
    """One sentence or two, with the remedy."""

    sentence: str
    again: bool  # whether another start may go well, on other hosts perhaps
    code: int = 1  # exit code; 2 where the user's environment asks for devices that are not there


def explained(error: BaseException) -> Explained | None:
    """What an error of JAX's runtime means; None for any other error, and for one that is not known.

    RESOURCE_EXHAUSTED is not explained here, because only the caller knows what takes less memory.
    """
    said = str(error).strip()
    if said.startswith("RESOURCE_EXHAUSTED"):
        return None
    if found := _no_devices(error, said):
        return found
    status = re.match(STATUS, said)
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or not status:
        return None
    first = said.splitlines()[0][:300].rstrip(".")
    for pattern, meaning, again in KNOWN:
        if re.search(pattern, said):
            return Explained(f"{meaning}. JAX says: {first}.", again)
    return Explained(f"{PEERS}. JAX says: {first}.", True) if status[1] in OF_PEERS else None


def _no_devices(error: BaseException, said: str) -> Explained | None:
    """What an error means where JAX does not find the devices that it was told to use; None for any other error."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if isinstance(error, RuntimeError) and (found := NO_DEVICES.search(said)):
        name, why = (group for group in found.groups() if group is not None)
    elif isinstance(error, AssertionError) and not said and platforms and not _finds_devices():
        name, why = platforms, "there is no such device here"  # JAX asserts that it has found one
    else:
        return None
    for pattern, meaning, _ in KNOWN:
        if meaning in (TPU_BUSY, GPU_BUSY) and re.search(pattern, why):
            return Explained(f"{meaning}. JAX says: {_short(why)}.", False, 2)
    kind = name.split(",")[0].strip().lower()
    hidden = "".join(f"; {k} is {os.environ[k] or 'empty'}" for k in VISIBLE.get(kind, GPUS_VISIBLE) if k in os.environ)
    asked = f"JAX_PLATFORMS={platforms}" if platforms else f"JAX's plugin for {name}"
    remedy = "unset JAX_PLATFORMS or set it to cpu" if platforms else "set JAX_PLATFORMS=cpu to do without it"
    if "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ:
        remedy = f"mend or unset PJRT_NAMES_AND_LIBRARY_PATHS, or {remedy}"
    if kind in EXTRAS:
        remedy += f", or install the extra `{EXTRAS[kind]}` and look after the driver"
    return Explained(f"{asked} gives JAX no device on this machine ({_short(why)}{hidden}); {remedy}.", False, 2)


def _short(why: str) -> str:
    """JAX's reason without the remedy that JAX adds to it."""
    return " ".join(why.split(" (set JAX_PLATFORMS")[0].split(" (you may need")[0].split()).rstrip(".")[:250]


def _finds_devices() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def cannot_import(error: BaseException) -> str:
    """A sentence that says why JAX could not be imported; '' where something else has failed."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("jax", "jaxlib"):
        return f"{error.name} is not installed; install the project anew (pip install .), in a fresh environment."
    trace, files = error.__traceback__, []
    while trace:
        files.append(trace.tb_frame.f_code.co_filename.replace("\\", "/"))
        trace = trace.tb_next
    if not any(file.endswith(("/jax/__init__.py", "/jaxlib/__init__.py")) for file in files):
        return ""
    why = _short(str(error)) or type(error).__name__
    if named := [k for k in os.environ if k.startswith("JAX_") and k.lower() in why.lower()]:
        return f"{named[0]}={os.environ[named[0]]} is nothing that JAX knows ({why}); mend it, or unset it."
    return (
        f"JAX cannot be imported ({why}); install the project anew, in a fresh environment (jax and jaxlib of one "
        "version)."
    )


def in_one_line(record: logging.LogRecord) -> bool:
    """A filter of JAX's log: makes a line, not a traceback, of a plugin that fails. The run goes on without it."""
    if record.exc_info and isinstance(record.exc_info[1], Exception):
        why = " ".join(str(record.exc_info[1]).split())[:400].rstrip(".") or record.exc_info[0].__name__
        record.msg = f"⚠ {record.getMessage().replace(' %s', '')}: {why}. JAX goes on without it."
        record.args, record.exc_info, record.exc_text = (), None, None
    return True
