"""Where files lie: in the current directory, or in /kaggle/working/IFViT on Kaggle; the cache in the user's home."""

import errno
import functools
import logging
import os
import pwd
import tempfile
from pathlib import Path

from ifvit.errors import UserError

KAGGLE_WORKING = Path("/kaggle/working")
log = logging.getLogger("ifvit")


def on_kaggle() -> bool:
    return bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE")) or KAGGLE_WORKING.is_dir()


def base_dir() -> Path:
    """The directory that relative paths start from."""
    return KAGGLE_WORKING / "IFViT" if on_kaggle() else Path(".")


def resolve(path: str) -> str:
    """A path as given; `~` is the home, and on Kaggle a relative path moves under /kaggle/working/IFViT.

    `./checkpoints/x` becomes `/kaggle/working/IFViT/checkpoints/x`; absolute paths, URLs and ''
    stay as they are, and so does every other path off Kaggle. UserError for a home that nobody has.
    """
    path = from_home(path)
    if not path or os.path.isabs(path) or "://" in path or not on_kaggle():
        return path
    return str(base_dir() / path)


def resolve_data(path: str) -> str:
    """A path that is read: where it lies if it exists there; else as `resolve` has it."""
    path = from_home(path)
    return path if os.path.exists(path) else resolve(path)


def absolute(path: str) -> str:
    """A path that means the same from every directory; URLs do."""
    return path if "://" in path else os.path.abspath(from_home(path))


def from_home(path: str) -> str:
    """The path with `~` or `~user` at its beginning as that home: no shell sees the paths in `--flag=~/x`, or in files.

    A path of a file that is there under such a name stays as it is. UserError for a home that nobody has.
    """
    if not path.startswith("~"):
        return path
    name, slash, rest = path.partition("/")
    home = home_of(name[1:])
    if home:
        return os.path.join(home, rest.lstrip("/")) if slash else home
    if len(name) > 1 and os.path.exists(path):
        return path
    who = (
        f"There is no user {name[1:]}, whose home"
        if len(name) > 1
        else "This user has no home (HOME is not set), which"
    )
    raise UserError(f"{who} {path} would name; give the path in full, or ./{path} for a folder of that name here.")


def home_of(user: str = "") -> str | None:
    """The home of a user, '' for the one who runs this; None where there is no such thing, as in a bare container."""
    given = os.environ.get("HOME", "")
    if not user and os.path.isabs(given) and given != str(_temporary_folder()):
        return given
    try:
        return (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir or None
    except KeyError:
        return None


def lend_home() -> None:
    """Sets HOME where there is no home, to the folder that then also has the cache: Ray ends without a home."""
    folder = _temporary_folder()
    if home_of() is None and folder and _is_private(folder):
        os.environ["HOME"] = str(folder)


def _temporary_folder() -> Path | None:
    """This user's in the temporary directory, whether it is there or not."""
    try:
        return Path(tempfile.gettempdir()) / f"ifvit-cache-{os.getuid()}"
    except FileNotFoundError:  # there is no temporary directory
        return None


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's alone; it is made if it is not there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        there = folder.lstat()
    except OSError:
        return False
    return not folder.is_symlink() and there.st_uid == os.getuid() and not there.st_mode & 0o022


def cache_dir() -> Path:
    """Prepared prints, generated prints and compiled programs; IFVIT_CACHE moves it.

    Where no other place can be written to it is a folder of this user's in the temporary directory, which the log says.
    UserError where IFVIT_CACHE names no folder that can be written to.
    """
    given = os.environ.get("IFVIT_CACHE", "")
    if given:
        if "://" in given:
            raise UserError(f"IFVIT_CACHE is {given}, and the cache lies on a disk; give a folder's path.")
        try:
            folder = absolute(resolve(given))
        except UserError as e:
            raise UserError(f"IFVIT_CACHE is {given}. {e}") from None
        return _chosen_cache(given, folder)
    return _own_cache(str(_usual_cache() or ""))


def _usual_cache() -> Path | None:
    """The usual place of the cache; None without a home.

    The standard of XDG_CACHE_HOME demands that relative paths in it are ignored.
    """
    if on_kaggle():
        return base_dir() / ".cache"
    xdg, home = os.environ.get("XDG_CACHE_HOME", ""), home_of()
    if os.path.isabs(xdg):
        return Path(xdg) / "ifvit"
    return Path(home) / ".cache" / "ifvit" if home else None


@functools.cache  # a process looks once: later the disk may be full, which is told where something is written
def _chosen_cache(given: str, folder: str) -> Path:
    if why := unusable(Path(folder)):
        raise UserError(
            f"IFVIT_CACHE is {given}, where nothing can be written ({why}); give another folder, or leave it out."
        )
    return Path(folder)


@functools.cache
def _own_cache(usual: str) -> Path:
    why = unusable(Path(usual)) if usual else "there is no home"
    if not why:
        return Path(usual)
    folder = _temporary_folder()
    if folder and _is_private(folder) and not unusable(folder):
        log.warning(
            "The cache lies in %s: %s cannot be written to (%s). IFVIT_CACHE gives it another place.",
            folder,
            usual or "~/.cache",
            why,
        )
        return folder
    raise UserError(
        f"There is no place for the cache: {usual or '~/.cache'} cannot be written to ({why}); "
        "set IFVIT_CACHE to a folder that can be."
    )


def unusable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which is made if it is not there; None where something can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except FileExistsError:
        return "it is no folder"
    except OSError as e:  # what is full may be read, and have room again when something is written
        return None if e.errno in (errno.ENOSPC, errno.EDQUOT) else e.strerror or str(e)
