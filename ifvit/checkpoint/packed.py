"""A trained network in one file of safetensors: its arrays by dotted names, its metadata as JSON in the file's header.

`params.resnet.stem.conv.kernel` there is `state/params/resnet/stem/conv/kernel` of a checkpoint. The optimiser's state
is left out. The weights of the package have this form, and PRETRAINED names them wherever a checkpoint's path is asked
for.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from etils import epath

from ifvit import weights

PRETRAINED = "pretrained"
SUFFIX = ".safetensors"
_KEY = "ifvit"  # of the metadata, in the header


def packaged() -> epath.Path:
    """Where the package's own weights lie, or would lie."""
    return epath.Path(weights.FOLDER / weights.FILE)


def is_packed(path: epath.Path) -> bool:
    """Whether a path that `locate` has found is such a file."""
    return path.suffix == SUFFIX and not path.is_dir()


def read_header(file: epath.Path) -> dict:
    """The metadata. Raises whatever a file of another form makes of it."""
    with _open(file) as opened:
        return json.loads(opened.metadata()[_KEY])


def read_arrays(file: epath.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays by their names in a checkpoint. Raises whatever a damaged file makes of it."""
    with _open(file) as opened:
        return {n: opened.get_tensor(_dotted(n)) for n in names}


def read_shapes(file: epath.Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Their shapes; no array is read."""
    with _open(file) as opened:
        return {n: tuple(opened.get_slice(_dotted(n)).get_shape()) for n in names}


def as_bytes(arrays: dict[str, np.ndarray], metadata: dict) -> bytes:
    """The content of such a file, of arrays by their names in a checkpoint."""
    import safetensors.numpy

    dotted = {_dotted(n): np.asarray(x, order="C") for n, x in arrays.items()}
    return safetensors.numpy.save(dotted, {_KEY: json.dumps(metadata, sort_keys=True)})


def _open(file: epath.Path):
    import safetensors  # only such files need it

    return safetensors.safe_open(Path(file), framework="np")


def _dotted(name: str) -> str:
    return name.removeprefix("state/").replace("/", ".")
