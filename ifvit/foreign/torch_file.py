"""The named arrays of a PyTorch or safetensors checkpoint, without torch; nothing in it is executed.

A torch file is a pickle; `foreign.pickles` describes what it asks for. The tensors in it are found by
walking through dictionaries, lists and objects, whatever their classes; those that are wanted are cut from
the file's bytes, with numpy checking the bounds.

Formats: the zip of `torch.save` >= 1.6 and the legacy one before it (torch/serialization.py), a whole module
or a dictionary in them; a pickle of a dictionary of tensors or numpy arrays; safetensors.
"""

import io
import math
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ifvit.errors import CheckpointNotFound, UserError
from ifvit.foreign import numpy_arrays
from ifvit.foreign.pickles import MAX_INSTRUCTIONS, MAX_NAME, Broken, Call, Dict, List, Name, parse, printable
from ifvit.foreign.plain import Builder

_NUMPY = "float32 float64 float16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128"
_DTYPES = {name: np.dtype(name) for name in _NUMPY.split()} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}

_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "QInt8": "int8", "QUInt8": "uint8", "QInt32": "int32",
}  # fmt: skip
_STORAGE_NAMES = {
    f"torch.{place}{kind}Storage": dtype for kind, dtype in _STORAGES.items() for place in ("", "cuda.")
} | {"torch.storage.UntypedStorage": None, "torch.UntypedStorage": None}  # the tensor tells its type

_SAFETENSORS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

_TENSORS = frozenset(
    {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
)
# Functions around a tensor, which is the first of their arguments.
_AROUND = frozenset(
    {
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch.nn.parameter.Parameter",
    }
)
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values",
}
_MODULES = ("_parameters", "_buffers", "_modules")  # of a torch.nn.Module; they are no part of a tensor's name

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class _Storage:
    """Where a tensor's numbers lie."""

    dtype: str | None  # None: bytes, the tensor tells its type
    key: str
    length: int  # elements, or bytes


def read_arrays(path: str | os.PathLike, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint that are `wanted`, by their names.

    A name is the way to a tensor: keys, positions and attributes, joined by dots, as
    `state_dict.matcher.backbone.conv1.weight`. Shapes and types are the file's (bfloat16 as
    `ml_dtypes.bfloat16`). What else lies in the file is not looked at.

    Raises UserError: the file is missing, unreadable, truncated or corrupt, of no known format, asks for
    something that could do harm, or holds a wanted tensor in a form that cannot be read (named).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(file, wanted)
            if head[8:9] == b"{":
                return _read_safetensors(path, wanted)
            if head.startswith(b"\x80"):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # it reads no more than is there
                    return _read_pickles(content, len(content), wanted)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except FileNotFoundError:
        raise CheckpointNotFound(
            f"Checkpoint not found: {path}. Give the path of a .ckpt, .pth or .safetensors file."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give a file that this user may read.") from None
    except Exception as error:  # a hostile or damaged file can make the parsers raise nearly anything
        why = printable(str(error)[:200])
        raise UserError(f"{path} is truncated or corrupt ({why}). Download or save it again.") from error
    raise UserError(f"{path} is neither a PyTorch nor a safetensors checkpoint. Give a file that torch.save wrote.")


def _read_zip(file: BinaryIO, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("is a zip, but not a PyTorch checkpoint. Give a file that torch.save wrote.")
        root = pickles[0].removesuffix("data.pkl")
        order = "little"  # files before torch 2.1 do not say
        if f"{root}byteorder" in archive.namelist():
            order = _member(archive, f"{root}byteorder").decode()
        if order not in ("little", "big"):
            raise Broken(f"byte order {order!r:.100}")
        raw = _member(archive, pickles[0])
        storages = _Storages(order, lambda storage: _member(archive, f"{root}data/{storage.key}"))
        return _arrays(parse(raw, storages.describe), wanted, storages, len(raw))


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch never compresses; a compressed member could be of any size once unpacked.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise Broken(f"member {name} is compressed")
    return archive.read(name)  # checks the CRC


def _read_pickles(file: BinaryIO, size: int, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The legacy format, which begins with a number, or a pickle as `pickle.dump` writes it."""
    storages = _Storages("little", None)
    root = parse(file, storages.describe)
    if type(root) is int and root == _LEGACY_MAGIC:
        root = _read_legacy(file, storages)
    return _arrays(root, wanted, storages, size)


def _read_legacy(file: BinaryIO, storages: "_Storages") -> Any:
    """What follows the magic number: the pickles, and the places of the storages after them."""
    protocol, _system = parse(file), parse(file)
    if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
        raise Broken("another protocol than 1001")
    root = parse(file, storages.describe)
    places = {}
    for key in parse(file):
        storage = storages.known[key]
        length = struct.unpack("<q", _exactly(file, 8))
        if length != (storage.length,):
            raise Broken(f"storage {key} has another length")
        places[key] = file.tell(), storage.length * _DTYPES[storage.dtype or "uint8"].itemsize
        _skip(file, places[key][1])

    def read(storage: _Storage) -> bytes:
        at, count = places[storage.key]
        file.seek(at)
        return _exactly(file, count)

    storages.read = read
    return root


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    import safetensors  # only such files need it

    arrays = {}
    with safetensors.safe_open(path, framework="np") as file:
        for name in filter(wanted, file.keys()):
            kind = file.get_slice(name).get_dtype()
            if kind not in _SAFETENSORS:
                raise UserError(f"holds {name} as {kind}, which is not supported. Save it as F32.")
            arrays[name] = file.get_tensor(name)
    return arrays


class _Storages:
    """The storages that a pickle refers to, and their bytes."""

    def __init__(self, order: str, read: Callable[[_Storage], bytes] | None):
        self.order, self.read = order, read
        self.known: dict[str, _Storage] = {}
        self.buffers: dict[tuple[str, str], bytes] = {}

    def describe(self, pid: Any) -> Any:
        """What a reference to something outside the pickle means: a storage, the class of a module, else None."""
        match pid:
            case ("storage", Name(kind), str(key), _, int(length), *view) if (
                kind in _STORAGE_NAMES and length >= 0 and view in ([], [None])
            ):
                storage = _Storage(_STORAGE_NAMES[kind], key, length)
                if self.known.setdefault(key, storage) != storage:
                    raise Broken(f"storage {key!r:.100} has two descriptions")
                return storage
            case ("module", Name() as made, *_):
                return made
        return None

    def of(self, name: str, x: Any, dtype: str | None) -> tuple[bytes, np.dtype]:
        """The bytes of a storage, and the type of the elements in it."""
        if type(x) is Call and x.name == "torch.storage._load_from_bytes":  # as pickle itself writes a tensor
            return self._in_bytes(name, x, dtype)
        if type(x) is not _Storage or self.read is None:
            raise Broken(f"{name} has no storage")
        dtype = x.dtype or dtype
        if dtype not in _DTYPES or x.dtype and self.known[x.key] != x:
            raise UserError(f"holds {name} in a type of its own. Save it as float32: model.float().state_dict().")
        if (x.key, dtype) not in self.buffers:
            raw = self.read(x)
            if len(raw) < x.length * (_DTYPES[dtype].itemsize if x.dtype else 1):
                raise Broken(f"storage {x.key:.100} is shorter than it says")
            self.buffers[x.key, dtype] = _native(raw, _DTYPES[dtype], self.order)
        return self.buffers[x.key, dtype], _DTYPES[dtype]

    @staticmethod
    def _in_bytes(name: str, x: Call, dtype: str | None) -> tuple[bytes, np.dtype]:
        if len(x.args) != 1 or type(x.args[0]) is not bytes:
            raise Broken(f"{name} has no storage")
        file, inner = io.BytesIO(x.args[0]), _Storages("little", None)
        if parse(file) != _LEGACY_MAGIC:
            raise Broken(f"{name} has a storage of an unknown format")
        return inner.of(name, _read_legacy(file, inner), dtype)


def _arrays(root: Any, wanted: Callable[[str], bool], storages: _Storages, size: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    builder = Builder(size)
    for name, tensor in _tensors(root):
        if not wanted(name):
            continue
        if name in found:
            raise UserError(
                f"holds two tensors of the name {printable(name)}. Save the weights alone: "
                "torch.save(model.state_dict(), PATH)."
            )
        found[name] = _array(printable(name), tensor, storages, builder)
    return found


def _tensors(root: Any) -> Iterator[tuple[str, Call]]:
    """Every tensor and numpy array that lies in a value, with the way to it; each container is entered once."""
    seen: set[Call | Dict | List] = set()
    left = MAX_INSTRUCTIONS
    todo = [("", root)]
    while todo:
        way, x = todo.pop()
        while type(x) is Call and x.name in _AROUND and x.args:
            x = x.args[0]
        match x:  # a tensor of a class of its own: the function that makes it, the class, the function's arguments
            case Call(Name("torch._tensor._rebuild_from_type_v2"), (Name(made), _, tuple(args), *_)) if (
                made in _TENSORS or made in _OTHER_TENSORS
            ):
                x = Call(Name(made), args)
        if type(x) is Call and (x.name in _TENSORS or x.name in _OTHER_TENSORS or x.name in numpy_arrays.ARRAYS):
            yield way, x
            continue
        if type(x) not in (Call, Dict, List, tuple) or len(way) > MAX_NAME or type(x) is not tuple and x in seen:
            continue
        if type(x) is not tuple:
            seen.add(x)
        inside = _inside(x)
        left -= len(inside)
        if left < 0:
            raise UserError(
                f"refers to the same content more than {MAX_INSTRUCTIONS:,} times. Save the weights alone: "
                "torch.save(model.state_dict(), PATH)."
            )
        todo += [(f"{way}.{key}" if way and key else way or key, value) for key, value in reversed(inside)]


def _inside(x: Any) -> list[tuple[str, Any]]:
    """What lies in a container, with its name there; '' where the name does not count."""
    if type(x) is Call:
        inside = _named(x.pairs) + [(str(i), value) for i, value in enumerate(x.items)]
        attributes = _named((x.attributes() or {}).items()) if x.state is not None else []
        inside += [("" if key in _MODULES else key, value) for key, value in attributes]
        return inside or [(str(i), value) for i, value in enumerate(x.args)]
    return _named(x.pairs) if type(x) is Dict else [(str(i), value) for i, value in enumerate(x)]


def _named(pairs: Any) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in pairs if type(key) is int or type(key) is str and len(key) <= MAX_NAME]


def _array(name: str, x: Call, storages: _Storages, builder: Builder) -> np.ndarray:
    if x.name in _OTHER_TENSORS:
        raise UserError(
            f"holds {name} as a tensor that is {_OTHER_TENSORS[x.name]}. Save the model's plain tensors, in float32."
        )
    if x.name in numpy_arrays.ARRAYS:
        array = numpy_arrays.build(x, builder.spend, lambda _: None)
        if not isinstance(array, np.ndarray):
            raise UserError(f"holds {name} as an array that is not one of numbers. Save it as float32.")
        return array
    dtype = None
    match x.args:
        case (_, _, _, _, _, _, Name(kind), *_) if x.name.endswith("_v3"):
            dtype = kind.removeprefix("torch.")
    storage, offset, size, stride, *_ = x.args
    size, stride = _plain(size), _plain(stride)
    if not (_is_count(offset) and _are_counts(size) and _are_counts(stride) and len(size) == len(stride)):
        raise Broken(f"{name} has an impossible size or stride")
    buffer, kind = storages.of(name, storage, dtype)
    if math.prod(size) == 0:
        return np.empty(size, kind)
    length = len(buffer) // kind.itemsize
    if math.prod(size) > length:  # a stride of 0 makes an array of any size out of one element
        raise UserError(f"holds {name} with more elements than it stores. Save it with .contiguous().")
    if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= length:
        raise Broken(f"{name} reaches beyond its storage")
    return np.ndarray(size, kind, buffer, offset * kind.itemsize, [step * kind.itemsize for step in stride])


def _plain(size: Any) -> Any:
    """torch.Size is a tuple, or a call of it with one."""
    return size.args[0] if type(size) is Call and size.name == "torch.Size" and len(size.args) == 1 else size


def _native(raw: bytes, dtype: np.dtype, order: str) -> bytes:
    if order == sys.byteorder:
        return raw
    word = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.frombuffer(raw, f"u{word}").byteswap().tobytes()


def _exactly(file: BinaryIO, count: int) -> bytes:
    """So many bytes; of an mmap and of a BytesIO no more than is there."""
    raw = file.read(count)
    if len(raw) != count:
        raise Broken("it ends too early")
    return raw


def _skip(file: BinaryIO, count: int) -> None:
    here = file.tell()
    file.seek(0, io.SEEK_END)
    if here + count > file.tell():
        raise Broken("it ends too early")
    file.seek(here + count)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(map(_is_count, values))
