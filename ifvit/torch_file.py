"""Reads the arrays of a PyTorch or safetensors checkpoint without torch, and executes nothing in it.

A torch file is a pickle, and a pickle can call anything it can name. Here it can name only what a
state dict needs, and all it gets are immutable descriptions (strings, tuples); the arrays are cut
from the file's bytes after the pickle has been read, with numpy checking the bounds.

Formats: the zip of `torch.save` >= 1.6 and the legacy one before it (torch/serialization.py);
safetensors (github.com/huggingface/safetensors, "Format").
"""

import io
import json
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ifvit.errors import UserError

_NUMPY = "float32 float64 float16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128"
_DTYPES = {name: np.dtype(name) for name in _NUMPY.split()} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip

_SAFETENSORS = {
    "F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

# What a pickle may name. Every value is immutable: a pickle can set attributes on what it is given.
_ALLOWED = (
    {"torch.Size": tuple}
    | {f"torch.{kind}Storage": dtype for kind, dtype in _STORAGES.items()}
    | {f"torch.{dtype}": dtype for dtype in _DTYPES}
)

_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_LEGACY_PROTOCOL = 1001
_MAX_HEADER = 100_000_000  # bytes of JSON, safetensors' own limit


class _Storage(NamedTuple):
    dtype: str
    key: str
    length: int  # elements


class _Tensor(NamedTuple):
    storage: Any
    offset: Any  # elements, as size and stride
    size: Any
    stride: Any


class _Broken(Exception):
    """The file's content contradicts itself."""


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The named arrays of a checkpoint, as read-only views of its bytes.

    A nested `{"state_dict": {...}}` is unwrapped. Shapes and dtypes are the file's
    (bfloat16 as `ml_dtypes.bfloat16`).

    Raises UserError: the file is missing, unreadable, truncated or corrupt, of no known format, or
    holds something other than tensors; a pickle's forbidden name is named.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(_LEGACY_MAGIC))
            file.seek(0)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(file)
            if head == _LEGACY_MAGIC:
                return _read_legacy(file)
            if head[8:9] == b"{":
                return _read_safetensors(file)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except FileNotFoundError:
        raise UserError(f"Checkpoint not found: {path}. Give the path of a .ckpt, .pth or .safetensors file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give a file that this user may read.") from None
    except Exception as error:  # a hostile or damaged file can make the parsers raise nearly anything
        raise UserError(f"{path} is truncated or corrupt ({error}). Download or save it again.") from error
    raise UserError(f"{path} is neither a PyTorch nor a safetensors checkpoint. Give a file that torch.save wrote.")


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python: C's makes room for any index of its memo that a file names.

    Keys of dictionaries are text or numbers: to hash a tuple that is nested deeply enough ends the process.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if code not in (pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0])}

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_dictionary(zip(items[::2], items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    dispatch |= {pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        # Fresh functions each time: attributes that a pickle sets on them are gone with them.
        if full_name == "torch._utils._rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if full_name == "torch._utils._rebuild_parameter":
            return lambda data, *_: data
        if full_name == "collections.OrderedDict":
            return lambda items=(): OrderedDict(_dictionary(items))
        if full_name in _ALLOWED:
            return _ALLOWED[full_name]
        raise UserError(
            f"asks for {full_name}, which a file of plain weights does not need, and was not run. "
            "Save the weights alone: torch.save(model.state_dict(), PATH)."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        tag, dtype, key, _location, length, *view = pid
        if tag != "storage" or type(dtype) is not str or dtype not in _DTYPES or type(key) is not str or not _is_count(length) or any(v is not None for v in view):
            raise _Broken(f"unknown storage {pid!r:.100}")
        storage = self.storages.setdefault(key, _Storage(dtype, key, length))
        if storage != (dtype, key, length):
            raise _Broken(f"storage {key!r:.100} has two descriptions")
        return storage


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise _Broken(f"a key that is a {type(key).__name__}")
    return key


def _dictionary(items: Iterable) -> dict:
    return {_key(key): value for key, value in items}


def _read_zip(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("is a zip, but not a PyTorch checkpoint. Give a file that torch.save wrote.")
        root = pickles[0].removesuffix("data.pkl")
        order = "little"  # files before torch 2.1 do not say
        if f"{root}byteorder" in archive.namelist():
            order = _member(archive, f"{root}byteorder").decode()
        state = _Unpickler(io.BytesIO(_member(archive, pickles[0]))).load()
        return _arrays(state, lambda storage: _member(archive, f"{root}data/{storage.key}"), order)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch never compresses; a compressed member could be of any size once unpacked.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _Broken(f"member {name} is compressed")
    return archive.read(name)  # checks the CRC


def _read_legacy(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    _magic, protocol, _system = (_Unpickler(file).load() for _ in range(3))
    if protocol != _LEGACY_PROTOCOL:
        raise _Broken(f"protocol {protocol!r:.100}")
    unpickler = _Unpickler(file)
    state = unpickler.load()
    raw = {}
    for key in _Unpickler(file).load():
        dtype, _, length = unpickler.storages[key]
        if struct.unpack("<q", _exactly(file, 8)) != (length,):
            raise _Broken(f"storage {key} has another length")
        raw[key] = _exactly(file, length * _DTYPES[dtype].itemsize)
    return _arrays(state, lambda storage: raw[storage.key], "little")


def _read_safetensors(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    (header_length,) = struct.unpack("<Q", _exactly(file, 8))
    if header_length > _MAX_HEADER:
        raise _Broken(f"a header of {header_length} bytes")
    header = json.loads(_exactly(file, header_length))
    header.pop("__metadata__", None)
    raw = file.read()
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS:
            raise UserError(f"holds {name} as {entry['dtype']}, which is not supported. Save it as F32.")
        dtype = _DTYPES[_SAFETENSORS[entry["dtype"]]]
        begin, end = entry["data_offsets"]
        if not (_is_count(begin) and _is_count(end) and begin <= end <= len(raw) and _are_counts(entry["shape"])):
            raise _Broken(f"{name} lies outside the file")
        if math.prod(entry["shape"]) * dtype.itemsize != end - begin:
            raise _Broken(f"{name} has another size than its shape")
        arrays[name] = np.ndarray(entry["shape"], dtype, _native(raw[begin:end], dtype, "little"))
    return arrays


def _arrays(state: Any, read: Callable[[_Storage], bytes], order: str) -> dict[str, np.ndarray]:
    """The tensors that a pickle described, cut from their storages' bytes."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError("holds no state dict. Save one: torch.save(model.state_dict(), PATH).")
    if order not in ("little", "big"):
        raise _Broken(f"byte order {order!r:.100}")

    buffers: dict[str, bytes] = {}
    arrays = {}
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, _Tensor)):
            raise UserError(
                f"holds {name!r:.100} ({type(tensor).__name__}), which is not a tensor. "
                "Save the weights alone: torch.save(model.state_dict(), PATH)."
            )
        storage = tensor.storage
        if not isinstance(storage, _Storage):
            raise _Broken(f"{name} has no storage")
        dtype = _DTYPES[storage.dtype]
        if storage.key not in buffers:
            buffers[storage.key] = _native(read(storage), dtype, order)
        arrays[name] = _view(name, tensor, dtype, buffers[storage.key])
    return arrays


def _view(name: str, tensor: _Tensor, dtype: np.dtype, buffer: bytes) -> np.ndarray:
    (_, _, length), offset, size, stride = tensor
    if not (_is_count(offset) and _are_counts(size) and _are_counts(stride) and len(size) == len(stride)):
        raise _Broken(f"{name} has an impossible size or stride")
    if math.prod(size) == 0:
        return np.empty(size, dtype)
    if math.prod(size) > length:  # a stride of 0 makes an array of any size out of one element
        raise UserError(f"holds {name} with more elements than it stores. Save it with .contiguous().")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if last >= length or len(buffer) < length * dtype.itemsize:
        raise _Broken(f"{name} reaches beyond its storage")
    return np.ndarray(size, dtype, buffer, offset * dtype.itemsize, [step * dtype.itemsize for step in stride])


def _native(raw: bytes, dtype: np.dtype, order: str) -> bytes:
    if order == sys.byteorder:
        return raw
    word = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.frombuffer(raw, f"u{word}").byteswap().tobytes()


def _exactly(file: io.BufferedIOBase, count: int) -> bytes:
    here = file.tell()
    if count > file.seek(0, io.SEEK_END) - here:  # before reading: a false count must not allocate
        raise _Broken("it ends too early")
    file.seek(here)
    return file.read(count)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(map(_is_count, values))
