"""Nothing under a root goes missing in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ifvit.data.sources import read, read_root
from ifvit.errors import UserError


def grow(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize("kind", "pgm PPM pnm jp2 j2k jpc jpx gif webp dib JFIF tif".split())
def test_what_pillow_reads_is_read(tmp_path, kind):
    assert len(read_root(grow(tmp_path, f"DB1/1_1.{kind}", "DB1/2_1.png"))) == 2


def test_archives_and_kinds_that_are_not_read_are_counted(tmp_path, caplog):
    grow(
        tmp_path,
        "DB1/1_1.png",
        "DB2.zip",
        "DB3.zip",
        "DB4.tar",
        "DB1/1_2.an2",
        "DB1/1_3.raw",
        "raw/0001",
        "DB1/1_4.tif.gz",
    )
    reading = read([tmp_path])
    for part in (
        "7 files are of kinds that are not read",
        "2 .zip",
        "1 .an2",
        "1 .raw",
        "1 .tar",
        "1 .gz",
        "1 without extension",
        "unpack the archives",
    ):
        assert part in caplog.text
    assert {Path(x.path).name: x.reason for x in reading.left_out} == {
        **{
            name: f"an archive, which has to be unpacked ({kind})"
            for name, kind in (("DB2.zip", ".zip"), ("DB3.zip", ".zip"), ("DB4.tar", ".tar"), ("1_4.tif.gz", ".gz"))
        },
        **{
            name: f"not an image that is read ({kind})"
            for name, kind in (("1_2.an2", ".an2"), ("1_3.raw", ".raw"), ("0001", "without extension"))
        },
    }


def test_texts_and_minutiae_beside_prints_are_no_prints(tmp_path, caplog):
    reading = read(
        [grow(tmp_path, "DB1/1_1.png", "README", "LICENSE", "a.md", "b.csv", "DB1/1_1.xyt", "DB1/1_1.txt", "c.sha256")]
    )
    assert not caplog.text and not reading.left_out


def test_a_root_of_archives_says_that_they_have_to_be_unpacked(tmp_path):
    with pytest.raises(UserError, match="1 .zip.*Unpack the archives"):
        read_root(grow(tmp_path, "FVC2002.zip"))


def test_what_is_left_out_is_told_with_its_reason(tmp_path):
    grow(
        tmp_path,
        "sd300/500/png/roll/00001000_roll_500_03.png",
        "sd300/500/png/plain/00001000_plain_500_13.png",
        "sd300/1000/png/roll/00001000_roll_1000_03.png",
        "sd300/500/png/roll/thumbnail.png",
        "sd300/images/latent/00002304_1C_R_L01_BP_S22_1200PPI_8BPC_1CH_LP03_1.png",
    )
    (tmp_path / "sd300/500/gone.png").symlink_to(tmp_path / "nowhere")
    reading = read([tmp_path])
    assert len(reading.prints) == 1
    assert {Path(x.path).name: x.reason for x in reading.left_out} == {
        "00001000_plain_500_13.png": "a slap or a palm",
        "00001000_roll_1000_03.png": "further copy of an impression",
        "thumbnail.png": "no known set's name",
        "00002304_1C_R_L01_BP_S22_1200PPI_8BPC_1CH_LP03_1.png": "a latent whose finger its name does not tell",
        "gone.png": "link that leads nowhere",
    }


def test_a_pipe_with_a_prints_name_is_not_waited_for(tmp_path, caplog):
    grow(tmp_path, "DB1/1_1.png")
    os.mkfifo(tmp_path / "DB1/1_2.png")
    assert len(read_root(tmp_path)) == 1 and "1 pipes, sockets or devices are left out" in caplog.text


# Root may read everything, unless it gives that up.
DROP = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if os.getuid() == 0
    else []
)
READ = """
import logging, sys
from ifvit.data.sources import read
logging.basicConfig(format="%(message)s", stream=sys.stdout)
reading = read([sys.argv[1]])
print(len(reading.prints), [(x.path, x.reason) for x in reading.left_out])
"""


def test_folders_and_files_that_may_not_be_read_are_named(tmp_path):
    grow(tmp_path, "DB1/1_1.png", "DB1/1_2.png", "DB2/1_1.png", "DB3/1_1.png")
    modes = {"DB1/1_2.png": 0o000, "DB2": 0o000, "DB3": 0o444}
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    try:
        said = subprocess.run([*DROP, sys.executable, "-c", READ, tmp_path], capture_output=True, text=True).stdout
    finally:
        for name in modes:
            (tmp_path / name).chmod(0o755)
    assert f"1 folders cannot be listed, and what they hold is left out: {tmp_path / 'DB2'}" in said, said
    assert "2 files cannot be read and are left out" in said and "links lead nowhere" not in said
    assert (
        said.splitlines()[-1].startswith("1 ")
        and "'folder cannot be listed'" in said
        and said.count("'file cannot be read'") == 2
    )


def test_a_root_that_may_not_be_listed_is_a_users_error(tmp_path):
    root = grow(tmp_path / "root", "1_1.png")
    root.chmod(0o000)
    try:
        said = subprocess.run([*DROP, sys.executable, "-c", READ, root], capture_output=True, text=True).stderr
    finally:
        root.chmod(0o755)
    assert f"UserError: {root} cannot be listed (Permission denied)" in said
