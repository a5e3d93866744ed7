"""Files that are whole or not there, file systems that cannot sync a folder, and text of any encoding."""

import ast
import errno
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest

from ifvit import checkpoint, files
from ifvit.checkpoint import unsynced
from ifvit.config import read_toml
from ifvit.errors import UserError

ROOT = Path(__file__).parents[2]


# --- whole or not at all ---------------------------------------------------------------------------


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    file = tmp_path / "metrics.json"
    files.write_whole(file, "ä")
    assert file.read_bytes() == "ä".encode()
    with pytest.raises(KeyboardInterrupt), files.whole(file) as part:
        part.write_text("half")
        assert file.read_bytes() == "ä".encode()
        raise KeyboardInterrupt
    assert file.read_bytes() == "ä".encode() and list(tmp_path.iterdir()) == [file]


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "to_disk", lambda path: synced.append((Path(path), (tmp_path / "x").exists())))
    files.write_whole(tmp_path / "x", b"1", durable=True)
    (part, named), (folder, then) = synced
    assert part.parent == tmp_path and not named and (folder, then) == (tmp_path, True)


# --- folders that cannot be synced -------------------------------------------------------------------


@pytest.fixture
def refuses(monkeypatch):
    """refuses(errno, opening=False): what the file system answers when a folder is synced, or opened for it."""
    sync, open_ = os.fsync, os.open

    def call(number: int, opening: bool = False):
        def fsync(handle):
            if not opening and stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))
            return sync(handle)

        def opened(path, flags, *more, **how):
            if opening and not flags & os.O_DIRECTORY and not isinstance(path, int) and os.path.isdir(path):
                raise OSError(number, os.strerror(number), path)
            return open_(path, flags, *more, **how)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "open", opened)

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("opening", [False, True])
def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, refuses, number, opening):
    refuses(number, opening)
    assert files.to_disk(tmp_path) is False
    files.write_whole(tmp_path / "x", b"1", durable=True)
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_was_not_written_is_a_failure(tmp_path, refuses, number):
    refuses(number)
    with pytest.raises(OSError) as e:
        files.to_disk(tmp_path)
    assert e.value.errno == number


def test_a_checkpoint_is_saved_where_folders_cannot_be_synced(tmp_path, refuses, monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    refuses(errno.EINVAL)
    made, context = [], tensorstore_utils.get_ts_context
    monkeypatch.setattr(tensorstore_utils, "get_ts_context", lambda **how: made.append(context(**how)) or made[-1])
    state = {
        "params": {"a": np.arange(3, dtype=np.float32)},
        "batch_stats": {"m": np.ones(2, np.float32)},
        "opt_state": {"n": np.zeros(2, np.float32)},
        "step": np.int32(3),
    }
    told = {
        "epoch": 1,
        "step": 3,
        "config": {"resnet_widths": [1]},
        "finished": True,
        "best": None,
        "value": None,
        "history": [],
        "data": "",
    }
    for _ in range(2):  # the second replaces the first
        checkpoint.save(tmp_path / "run/dense_reg_ckpt", "dense_reg", state, told)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["dense_reg_ckpt"]
    assert not checkpoint.difference(state, checkpoint.load(tmp_path / "run/dense_reg_ckpt").state)
    # TensorStore, which would take the refusal for a failed write, was not asked to sync
    assert made and all(c["file_io_sync"].to_json() is False for c in made)
    assert context()["file_io_sync"].to_json() is not False


def test_tensorstore_syncs_wherever_it_can(tmp_path):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    with unsynced.synced_as_can_be(tmp_path / "not there yet") as synced:
        assert synced and "file_io_sync" not in tensorstore_utils._BASE_TS_CONTEXT


# --- text of any encoding --------------------------------------------------------------------------

TEXT = 'seed = 3\ndataset_root = ["Käse/指紋"]\n'


@pytest.mark.parametrize(
    "encoding, mark",
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\0\0"),
        ("utf-32-be", b"\0\0\xfe\xff"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_configuration_is_read_with_any_encoding_mark(tmp_path, encoding, mark, newline):
    (tmp_path / "c.toml").write_bytes(mark + TEXT.replace("\n", newline).encode(encoding))
    assert read_toml(str(tmp_path / "c.toml")) == {"seed": 3, "dataset_root": ["Käse/指紋"]}


def test_a_configuration_in_another_encoding_names_its_line(tmp_path):
    (tmp_path / "c.toml").write_bytes(TEXT.encode("cp1252", "replace"))
    with pytest.raises(UserError, match=r"not text in UTF-8 \(line 2\)"):
        read_toml(str(tmp_path / "c.toml"))
    (tmp_path / "c.toml").write_bytes(TEXT.encode("utf-16-le"))
    with pytest.raises(UserError, match="UTF-16 without a mark"):
        read_toml(str(tmp_path / "c.toml"))


def test_a_configuration_is_read_in_a_locale_without_letters(process, tmp_path):
    (tmp_path / "Käse").mkdir()
    (tmp_path / "c.toml").write_text(TEXT.replace("/指紋", ""), encoding="utf-8")
    code = (
        "import os\nfrom ifvit.config import *\n"
        "print(os.path.isdir(with_changes(DENSE_CONFIG, read_toml('c.toml')).dataset_root[0]))"
    )
    said = process("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert said.out == "True\n", said


@pytest.mark.parametrize("package", ["ifvit", "tune", "cluster"])
def test_every_text_file_is_opened_with_its_encoding(package):
    for file in (ROOT / package).rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            mode = next(
                (
                    a.value
                    for a in call.args
                    if isinstance(a, ast.Constant) and re.fullmatch("[rwax][bt+]*", str(a.value))
                ),
                "",
            )
            text = (
                name == "open"
                and mode
                and "b" not in mode
                or name in ("read_text", "write_text")
                and isinstance(call.func, ast.Attribute)
            )
            assert not text or any(k.arg == "encoding" for k in call.keywords), f"{file}:{call.lineno}"
