"""Every file under a folder of prints: the images, and what is not read and why."""

import functools
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ifvit.errors import UserError

EXTENSIONS = {
    f".{kind}" for kind in "tif tiff png bmp dib jpg jpeg jpe jfif wsq pgm ppm pnm jp2 j2k j2c jpc jpx gif webp".split()
}
_ARCHIVES = {f".{kind}" for kind in "zip tar tgz gz bz2 xz zst 7z rar iso".split()}
# What lies beside prints and is none: texts, tables, minutiae, checksums, code.
_DOCUMENTS = {
    f".{kind}"
    for kind in "txt md rst html htm pdf doc docx rtf odt csv tsv xls xlsx json jsonl xml yaml yml toml ini cfg log "
    "lst list xyt min mnt md5 sha1 sha256 py ipynb m sh bat ps1 c h cpp java db bib tex license".split()
}
_DOCUMENT_NAMES = re.compile(
    r"readme|licen[sc]e|changelog|notice|authors|citation|makefile|md5sums?|sha\d+sums?", re.IGNORECASE
)

UNLISTED = "folder cannot be listed"
UNREAD = "file cannot be read"
NOWHERE = "link that leads nowhere"


@dataclass(frozen=True)
class LeftOut:
    """A file or a folder that is not read."""

    path: str
    reason: str  # a short phrase that can be counted, such as "a slap or a palm"


@dataclass
class Walk:
    """What was met under one root."""

    images: dict[Path, list[str]] = field(default_factory=dict)  # of each folder, in natural order
    others: Counter[str] = field(default_factory=Counter)  # extensions of all other files
    left_out: list[LeftOut] = field(default_factory=list)  # not the documents among them


def walk(root: Path) -> Walk:
    """The files under `root`. Links to folders are followed, hidden files and those of file managers are passed over.

    Raises: UserError for a root that is missing, a file, or may not be listed.
    """
    if not root.exists():
        raise UserError(f"There is no folder {root}. Check the path of --dataset_root.")
    if not root.is_dir():
        raise UserError(f"{root} is a file. Give --dataset_root the folder that holds it.")
    met, visited = Walk(), set()

    def unlisted(error: OSError) -> None:
        if Path(error.filename) == root:
            raise UserError(
                f"{root} cannot be listed ({error.strerror}). Ask for the right to read it, or give "
                "another --dataset_root."
            )
        met.left_out.append(LeftOut(str(error.filename), UNLISTED))

    for place, inner, files in os.walk(root, followlinks=True, onerror=unlisted):
        if (real := os.path.realpath(place)) in visited:
            inner.clear()  # a link back to where we were
            continue
        visited.add(real)
        inner[:] = sorted((d for d in inner if d[0] != "." and d not in ("__MACOSX", "@eaDir")), key=natural)
        images = []
        for file in sorted((f for f in files if f[0] != "." and f != "Thumbs.db"), key=natural):
            path, kind = os.path.join(place, file), Path(file).suffix.lower()
            if why := _why_not(path, kind):
                met.left_out.append(LeftOut(path, why))
            elif kind in EXTENSIONS:
                images.append(file)
                continue
            met.others[kind or "without extension"] += 1
        if images:
            met.images[Path(place)] = images
    return met


def _why_not(path: str, kind: str) -> str:
    """Why a file is not read, and '' of an image and of a document."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NOWHERE
    except PermissionError:  # the folder can be listed and not entered
        return UNREAD
    except OSError as error:
        return NOWHERE if os.path.islink(path) else f"{UNREAD} ({error.strerror})"
    if not stat.S_ISREG(mode):
        return "not a file but a pipe, socket or device"  # reading it may never end
    if kind in EXTENSIONS:
        return "" if os.access(path, os.R_OK) else UNREAD
    if kind in _ARCHIVES:
        return f"an archive, which has to be unpacked ({kind})"
    if kind in _DOCUMENTS or (not kind and _DOCUMENT_NAMES.fullmatch(os.path.basename(path))):
        return ""
    return f"not an image that is read ({kind or 'without extension'})"


def warnings(root: Path, left_out: Iterable[LeftOut]) -> Iterable[str]:
    """A line for each kind of what is left out that a user will want to know of."""

    def of(test) -> list[str]:
        return [x.path for x in left_out if test(x.reason)]

    if paths := of(lambda r: r == UNLISTED):
        yield (
            f"{root}: {len(paths)} folders cannot be listed, and what they hold is left out: {', '.join(paths[:5])}"
            f"{' …' if len(paths) > 5 else ''}; ask for the right to read them."
        )
    if paths := of(lambda r: r.startswith(UNREAD)):
        yield (
            f"{root}: {len(paths)} files cannot be read and are left out, such as {paths[0]}; ask for the right to "
            "read them."
        )
    if paths := of(lambda r: r == NOWHERE):
        yield f"{root}: {len(paths)} links lead nowhere and are left out, such as {paths[0]}"
    if paths := of(lambda r: r.endswith("pipe, socket or device")):
        yield f"{root}: {len(paths)} pipes, sockets or devices are left out, such as {paths[0]}"
    unread = [x for x in left_out if x.reason.startswith(("an archive", "not an image"))]
    if unread:
        count = Counter(x.reason.rpartition("(")[2].rstrip(")") for x in unread)
        kinds = ", ".join(f"{n} {kind}" for kind, n in count.most_common())
        unpack = "unpack the archives; " if any(x.reason.startswith("an archive") for x in unread) else ""
        yield (
            f"{root}: {len(unread)} files are of kinds that are not read and are left out: {kinds}, such as "
            f"{unread[0].path}; {unpack}images end in {' '.join(sorted(EXTENSIONS))}."
        )


def file_digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes; one that has not changed is read once a process."""
    status = os.stat(path)
    return _read_digest(str(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _read_digest(path: str, size: int, mtime: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def natural(text: str) -> list[tuple[int, int | str, str]]:
    """A sort key by which 2 comes before 10."""
    return [(0, int(part), part) if part.isdecimal() else (1, part, "") for part in re.split(r"(\d+)", text) if part]
