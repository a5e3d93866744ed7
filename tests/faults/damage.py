"""Damages a copy of a checkpoint in every place, one at a time, and asks each time what is read.

Every file is cut to half, cut to nothing, deleted, zeroed, given one wrong bit and a wrong end; every
directory is removed. Right is: a UserError (detected), or the very same leaves and metadata (harmless,
e.g. a file that nothing reads). Anything else, another exception or a traceback on stderr included, is a
failure.

    python tests/faults/damage.py CHECKPOINT     # about a minute; exit 1 where a failure is
"""

import collections
import contextlib
import io
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))

import tyro

from faults import bits
from ifvit import checkpoint
from ifvit.errors import UserError

END = 100  # bytes that are replaced at the end of a file


def one_bit(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return content
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def other_end(content: bytes, rng: random.Random) -> bytes:
    return content[:-END] + rng.randbytes(min(END, len(content)))


# fault -> what becomes of a file's content; None: the file is deleted
FAULTS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "cut to half": lambda content, rng: content[: len(content) // 2],
    "cut to nothing": lambda content, rng: b"",
    "deleted": lambda content, rng: None,
    "zeroed": lambda content, rng: bytes(len(content)),
    "one bit flipped": one_bit,
    "other end": other_end,
}
REMOVED = "removed"  # the fault of a directory


@dataclass(frozen=True)
class Outcome:
    """What became of one fault in one place."""

    place: str  # relative path, a directory's with / at its end
    size: int  # bytes
    fault: str
    verdict: str  # `detected`, `harmless`, `FAILURE`, or `-` where the content is as it was
    said: str


def damage(path: Path, fault: str, rng: random.Random) -> bool:
    """Brings the fault about; False where the content is the same afterwards."""
    if path.is_dir():
        shutil.rmtree(path)
        return True
    before = path.read_bytes()
    after = FAULTS[fault](before, rng)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return after != before


def damage_everything(source: Path, seed: int = 0, faults: tuple[str, ...] = tuple(FAULTS)) -> Iterator[Outcome]:
    """One of `faults` after the other in every file, and every directory removed, each in a fresh copy of `source`."""
    rng = random.Random(seed)
    whole = _content(source)
    places = sorted(source.rglob("*"))
    with tempfile.TemporaryDirectory(prefix="damage_") as copies:
        number = 0
        for place in places:
            for fault in [REMOVED] if place.is_dir() else faults:
                number += 1  # a new name each time: nothing that has been read before is remembered
                copy = Path(copies) / f"{number}" / source.name
                shutil.copytree(source, copy)
                target = copy / place.relative_to(source)
                name, size = f"{place.relative_to(source)}{'/' * place.is_dir()}", place.stat().st_size
                if damage(target, fault, rng):
                    verdict, said = _read(copy, whole)
                else:
                    verdict, said = "-", ""
                yield Outcome(name, size, fault, verdict, said.replace(str(copy), source.name))
                shutil.rmtree(copy.parent)


def array_files(path: Path) -> list[Path]:
    """Files with arrays of `state`, the largest first; what lies beside their directories describes them."""
    files = [p for p in (path / "state").glob("*/**/*") if p.is_file()]
    return sorted(files, key=lambda p: (-p.stat().st_size, p))


def flip_in_arrays(path: Path, rng: random.Random, leaf: str = "params") -> None:
    """Flips one bit of the arrays in `state`, so that a leaf whose name holds `leaf` is damaged.

    Not every bit is read, and other leaves lie there too: it is taken back and another one flipped until
    what is said of it names such a leaf.
    """
    files = array_files(path)
    said = "nothing"
    for _ in range(200):
        file = rng.choices(files, [p.stat().st_size for p in files])[0]
        content = file.read_bytes()
        file.write_bytes(one_bit(content, rng))
        try:
            checkpoint.load(path)
        except UserError as e:
            said = str(e)
            if re.search(rf"{leaf}[./]", said):
                return
        file.write_bytes(content)
    raise AssertionError(f"of 200 bits flipped in {path} none was said to damage {leaf}; last: {said}")


def _content(path: Path) -> tuple:
    found = checkpoint.load(path)
    return bits(found.state), bits(found.aligner or {}), found.metadata


def _read(copy: Path, whole: tuple) -> tuple[str, str]:
    """Verdict, and what was said."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            read = _content(copy)
        except Exception as e:
            read = e
            time.sleep(0.02)  # TensorStore's threads complain on their own time
    if "Traceback" in stderr.getvalue():
        errors = re.findall(r"^[\w.]*Error\b.*", stderr.getvalue(), re.M)
        return "FAILURE", f"a traceback on stderr ({errors[-1] if errors else ''}), then: {read}"
    if isinstance(read, UserError):
        return ("FAILURE", f"several lines: {str(read)!r}") if "\n" in str(read).strip() else ("detected", str(read))
    if isinstance(read, Exception):
        return "FAILURE", f"{type(read).__name__}: {read}".splitlines()[0]
    if read == whole:
        return "harmless", ""
    parts = [name for name, a, b in zip(("state", "aligner", "metadata"), read, whole) if a != b]
    return "FAILURE", f"read without a word, but not the same: {', '.join(parts)}"


@dataclass(frozen=True)
class Args:
    path: Annotated[str, tyro.conf.Positional]
    """checkpoint; it is left as it is"""
    seed: int = 0
    """of the bits and the bytes"""


def main(args: Args) -> int:
    counts = collections.Counter()
    for o in damage_everything(Path(args.path).absolute(), args.seed):
        counts[o.verdict] += 1
        print(f"{o.place[-60:]:60s} {o.size:9d}  {o.fault:15s}  {o.verdict:8s}  {o.said}", flush=True)
    print(
        ", ".join(
            f"{counts[v]} {what}"
            for v, what in (
                ("detected", "detected"),
                ("harmless", "harmless"),
                ("-", "without effect"),
                ("FAILURE", "FAILURES"),
            )
        )
    )
    return 1 if counts["FAILURE"] else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
