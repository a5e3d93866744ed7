"""Where things lie: the current directory locally, /kaggle/working/IFViT in a Kaggle notebook."""

import os
from pathlib import Path

KAGGLE_WORKING = Path("/kaggle/working")


def on_kaggle() -> bool:
    return bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE")) or KAGGLE_WORKING.is_dir()


def base_dir() -> Path:
    """The directory that relative paths start from."""
    return KAGGLE_WORKING / "IFViT" if on_kaggle() else Path(".")


def resolve(path: str) -> str:
    """A path as given; on Kaggle a relative one moves under /kaggle/working/IFViT.

    `./checkpoints/x` becomes `/kaggle/working/IFViT/checkpoints/x`; absolute paths, URLs and ''
    stay as they are, and so does every path off Kaggle.
    """
    if not path or os.path.isabs(path) or "://" in path or not on_kaggle():
        return path
    return str(base_dir() / path)


def resolve_data(path: str) -> str:
    """A data path is read where it lies if it exists there; else as `resolve` has it."""
    return path if os.path.exists(path) else resolve(path)


def absolute(path: str) -> str:
    """A path that means the same from every directory; URLs do."""
    return path if "://" in path else os.path.abspath(path)


def cache_dir() -> Path:
    """Prepared prints, generated prints and compiled programs; IFVIT_CACHE moves it."""
    if "IFVIT_CACHE" in os.environ:
        return Path(os.environ["IFVIT_CACHE"])
    if on_kaggle():
        return base_dir() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ifvit"
