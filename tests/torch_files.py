"""Files of weights as torch and safetensors write them, put together by hand: the opcodes of pickle protocol 2."""

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest

from ifvit.errors import UserError


def value(plain):
    return pickle.dumps(plain, 2)[2:-1]  # without PROTO and STOP


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(items):
    return b"}(" + b"".join(value(key) + item for key, item in items.items()) + b"u"


def storage(key, length, kind="FloatStorage"):
    pid = value("storage"), name("torch", kind), value(key), value("cpu"), value(length)
    return b"(" + b"".join(pid) + b"tQ"


def tensor(stored, size, stride, offset=0):
    hooks = call(name("collections", "OrderedDict"))
    rest = value(offset), value(size), value(stride), value(False), hooks
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, *rest)


def row_major(size):
    return tuple(int(np.prod(size[i + 1 :])) for i in range(len(size)))


def write_zip(path, body, storages, byteorder=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        if byteorder:
            archive.writestr("archive/byteorder", byteorder)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


def write_torch(path, arrays, unwrap=False, more=b""):
    """`more`: instructions of further items beside the state dict."""
    body = mapping(
        {k: tensor(storage(str(i), a.size), a.shape, row_major(a.shape)) for i, (k, a) in enumerate(arrays.items())}
    )
    body = mapping({"epoch": value(3), "state_dict": body}) if unwrap else body
    body += b"(" + more + b"u" if more else b""
    return write_zip(path, body, {str(i): a.astype("<f4").tobytes() for i, a in enumerate(arrays.values())})


def write_legacy(path, body, storages):
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    # In the legacy format a storage's description ends with its view, None as ever.
    parts += [b"\x80\x02" + body.replace(b"tQ", b"NtQ") + b".", pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", len(raw) // 4) + raw for raw in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def write_safetensors(path, arrays, dtype="F32"):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, array in arrays.items():
        raw = array.tobytes()
        header[key] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def loftr_state(layers=8, width=256, prefix="matcher."):
    """A LoFTR state dict of random numbers: names and shapes as in zju3dv/LoFTR's outdoor_ds.ckpt."""
    rng = np.random.default_rng(0)
    shapes = {f"{part}.weight": (width, width) for part in ("q_proj", "k_proj", "v_proj", "merge")}
    shapes |= {"mlp.0.weight": (2 * width, 2 * width), "mlp.2.weight": (width, 2 * width)}
    shapes |= {f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {
        f"{prefix}loftr_coarse.layers.{layer}.{key}": rng.standard_normal(shape, np.float32)
        for layer in range(layers)
        for key, shape in shapes.items()
    }


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)
