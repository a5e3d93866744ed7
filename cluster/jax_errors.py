"""What errors of JAX's runtime mean, and what a user can do about them: one sentence each.

Only what is known is explained: anything else is a defect, or new, and its traceback is worth having.
"""

import logging
import os
import re
from dataclasses import dataclass

# of a message, in this order; `{said}` is what JAX says
GPU_LIBRARIES = ("The GPU's libraries (CUDA, cuDNN) or its driver do not fit this jaxlib, or another process has the GPU's memory. Look with "
                 "nvidia-smi who is on the GPU and which driver it has; then install the extra `cuda` in a fresh environment, with "
                 "LD_LIBRARY_PATH unset")
DRIVER = ("The NVIDIA driver is too old for this jaxlib. Update the driver (nvidia-smi shows it), or install a jax whose CUDA it knows")
BUSY = ("Another process has the {device}. End it (`{tool}` shows it), wait for its end, or give this one another with {variable}")
BROKEN = ("The {device} has failed in the midst of its work. The same command goes on from the last checkpoint; if it fails again, look into "
          "the machine's log (`dmesg`) and restart the machine, or take another")
NCCL = ("The GPUs cannot talk to each other by NCCL. NCCL_DEBUG=INFO tells why; often NCCL_SOCKET_IFNAME has to name the network of the "
        "hosts, or the container's /dev/shm is too small (docker run --shm-size=8g)")
PEERS = ("Another process of the run is gone or cannot be reached. The other hosts' logs say why; every port has to be open between the hosts, "
         "and no proxy between them")

gpu = {"device": "GPU", "tool": "nvidia-smi", "variable": "CUDA_VISIBLE_DEVICES"}
tpu = {"device": "TPU", "tool": "sudo lsof -w /dev/accel* /dev/vfio/*", "variable": "TPU_VISIBLE_CHIPS"}
CUDA = r"CUDA|cuda|GPU|NVIDIA|ptxas"
KNOWN = [  # (of the message, sentence, whether another start may help)
    (r"NCCL|nccl[A-Z]", NCCL, True),
    (r"driver version is insufficient|InsufficientDriver|driver on your system is too old|UNSUPPORTED_PTX_VERSION|COMPAT_NOT_SUPPORTED"
     r"|SYSTEM_DRIVER_MISMATCH|forward compatibility was attempted", DRIVER, False),
    (r"TPU is already in use|libtpu.* already in use|/dev/(accel|vfio).* busy", BUSY.format(**tpu), False),
    (r"CUDA_ERROR_DEVICE_UNAVAILABLE|devices? (is|are) (all )?busy or unavailable|CUDA-capable device\(s\) is/are busy", BUSY.format(**gpu), False),
    (r"CUDA_ERROR_(ILLEGAL|LAUNCH|ECC|MISALIGNED|ASSERT|HARDWARE|NVLINK|CONTAINED|EXTERNAL_DEVICE)|uncorrectable ECC"
     r"|illegal memory access|unspecified launch failure", BROKEN.format(**gpu), True),
    (r"Core halted|TPU.*(halted|unhealthy|lost)|Slice health", BROKEN.format(**tpu), True),
    (r"no kernel image|NO_BINARY_FOR_GPU", "This jaxlib has no programs for this GPU, which is too old or too new for it. Use another GPU, or "
     "JAX_PLATFORMS=cpu", False),
    (r"DNN library|cu(DNN|dnn|BLAS|blas|FFT|fft|Solver|solver|Sparse|sparse)|CU(DNN|BLAS|FFT|SOLVER|SPARSE)_|BLAS support|[Dd]nn [Ss]upport"
     r"|DNN support|ptxas|libdevice|gpusolver|gpublas|cuInit|CUDA_ERROR|cudaError|CUDA (error|runtime|driver|version)", GPU_LIBRARIES, False),
    (r"[Gg]loo|[Cc]oordination ?[Ss]ervice|CoordinationService|[Bb]arrier|heartbeat|PjRT_Client_Connect|jax_worker|[Cc]onnection (refused|reset|"
     r"closed)|[Ss]ocket closed|connect to (all addresses|remote host)|Connect(\(\))? time[d -]*out", PEERS, True),
]
STATUS = r"(?:[A-Z][\w.]*: )*(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION|INTERNAL|UNKNOWN|NOT_FOUND|UNIMPLEMENTED)\b"
OF_PEERS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")


@dataclass(frozen=True)
class Explained:
    """One sentence or two, with the remedy."""

    sentence: str
    again: bool     # whether another start may go well, on other hosts perhaps
    code: int = 1   # exit code: 2 where the user's environment asks for what there is not


def explained(error: BaseException) -> Explained | None:
    """What an error of JAX's runtime means; None for any other, and for one that is not known."""
    said = str(error).strip()
    if said.startswith("RESOURCE_EXHAUSTED"):  # of the device's memory, which the caller knows the use of
        return None
    if no_devices := _no_devices(error, said):
        return no_devices
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or not (status := re.match(STATUS, said)):
        return None
    first = said.splitlines()[0][:300].rstrip(".")
    for pattern, sentence, again in KNOWN:
        if re.search(pattern, said):
            return Explained(f"{sentence}. JAX says: {first}.", again)
    return Explained(f"{PEERS}. JAX says: {first}.", True) if status[1] in OF_PEERS else None


def _no_devices(error: BaseException, said: str) -> Explained | None:
    """Where JAX does not find the devices that it was told to use."""
    found = re.search(r"Unable to initialize backend '([^']*)': ?(.*)|Backend '(.*)' failed to initialize: (.*)|Unknown backend:? '?(\w+)(.*)"
                      r"|Failed to open (\S+): (.*)", said, re.DOTALL)
    if isinstance(error, RuntimeError) and found:
        name, why = (g for g in found.groups() if g is not None)
    elif isinstance(error, AssertionError) and not said and _platforms() and not _finds_devices():
        name, why = _platforms(), "there is no such device here"  # JAX asserts that it has found one
    else:
        return None
    busy = next((s for pattern, s, _ in KNOWN if s.startswith("Another process has") and re.search(pattern, why)), "")
    if busy:
        return Explained(f"{busy}. JAX says: {_short(why)}.", False, 2)
    asked = f"JAX_PLATFORMS={_platforms()}" if _platforms() else f"JAX's plugin for {name}"
    hidden = "".join(f"; {k} is {v or 'empty'}" for k in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")
                     if (v := os.environ.get(k)) is not None and (k[:4] != "TPU_" or "tpu" in name) and (k[:4] == "TPU_" or "tpu" not in name))
    remedy = "unset JAX_PLATFORMS or set it to cpu" if _platforms() else "set JAX_PLATFORMS=cpu to do without it"
    if "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ:
        remedy = f"mend or unset PJRT_NAMES_AND_LIBRARY_PATHS, or {remedy}"
    extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(name.split(",")[0].strip().lower())
    install = f", or install the extra `{extra}` and look after the driver" if extra else ""
    return Explained(f"{asked} gives JAX no device on this machine ({_short(why)}{hidden}); {remedy}{install}.", False, 2)


def _short(why: str) -> str:
    """Of JAX's reason what is not its own remedy."""
    return " ".join(why.split(" (set JAX_PLATFORMS")[0].split(" (you may need")[0].split()).rstrip(".")[:250]


def _platforms() -> str:
    return os.environ.get("JAX_PLATFORMS", "")


def _finds_devices() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def cannot_import(error: BaseException) -> str:
    """Why JAX could not be imported, a sentence, where that is what has failed; else ''."""
    trace, files = error.__traceback__, []
    while trace:
        files.append(trace.tb_frame.f_code.co_filename.replace("\\", "/"))
        trace = trace.tb_next
    if isinstance(error, ModuleNotFoundError) and error.name in ("jax", "jaxlib"):
        return f"{error.name} is not installed; install the project anew (pip install .), in a fresh environment."
    if not any(file.endswith(("/jax/__init__.py", "/jaxlib/__init__.py")) for file in files):
        return ""
    why = _short(str(error)) or type(error).__name__
    if named := [k for k in os.environ if k.startswith("JAX_") and k.lower() in why.lower()]:
        return f"{named[0]}={os.environ[named[0]]} is nothing that JAX knows ({why}); mend it, or unset it."
    return f"JAX cannot be imported ({why}); install the project anew, in a fresh environment (jax and jaxlib of one version)."


def in_one_line(record: logging.LogRecord) -> bool:
    """A filter of JAX's log: a plugin that cannot be used is a line, not a traceback; the run goes on without it."""
    if record.exc_info and isinstance(record.exc_info[1], Exception):
        lines = str(record.exc_info[1]).strip().splitlines() or [record.exc_info[0].__name__]
        record.msg = f"⚠ {record.getMessage().replace(' %s', '')}: {' '.join(line.strip() for line in lines)[:400]}. JAX goes on without it."
        record.args, record.exc_info, record.exc_text = (), None, None
    return True
