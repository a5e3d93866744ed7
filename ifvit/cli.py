"""Parses the flags of every command, and ends it: with one sentence on stderr for a user's mistake, and an exit code.

0 done · 1 a failure (NaN included) · 2 the user's mistake · 75 preempted, saved · 130 Ctrl-C, saved.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from cluster import xla_flags
from cluster.jax_errors import explained, in_one_line
from ifvit import flags
from ifvit.errors import Failure, Interrupted, UserError
from ifvit.paths import lend_home

FULL_DEVICE = (
    "The memory of the device is full. --set accumulate=4 goes through a batch in four parts (in train_all "
    "--set dense.accumulate=4 --set match.accumulate=4), --set compute_dtype=bfloat16 or --set remat=true take "
    "less of it; nvidia-smi shows whether another process has some. JAX says: {}"
)
ROOM_FOR_PROGRAMS = 50e6  # bytes


def parse(cls, name: str, argv: list[str]):
    """`cls`, a dataclass of flags, from the command line; unknown flags name the nearest known one."""
    known = ["--" + f.name.rstrip("_") for f in dataclasses.fields(cls)]
    argv = flags.read(cls, argv)
    given = ["--" + w[2:].split("=")[0].replace("-", "_") for w in argv if w.startswith("--")]
    unknown = [flag for flag in given if flag not in (*known, "--help")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if not unknown:
                args, unknown = tyro.cli(
                    cls,
                    prog=f"python -m {name}",
                    args=argv,
                    return_unknown_args=True,
                    use_underscores=True,
                    config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
                )
    except SystemExit as e:
        if not e.code:  # --help
            raise
        rule = lambda line: not line.strip("─-")  # a ruled or a blank line
        # The first line is the box's title.
        box = itertools.dropwhile(rule, [line.strip("│ ") for line in said.getvalue().splitlines()[1:]])
        what = " ".join(itertools.takewhile(lambda line: not rule(line), box))
        raise UserError(f"{what.rstrip('.')}; python -m {name} --help tells what each flag takes.") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, known, 1, cutoff=0.4)
        raise UserError(
            f"Unknown {'flag' if flag.startswith('-') else 'argument'} {flag}; "
            + (f"did you mean {near[0]}?" if near else f"python -m {name} --help lists the flags.")
        )
    return flags.from_homes(args)


def main(cls, name: str, argv: list[str] | None = None, huge_pages: bool = False) -> int:
    """Parses `cls`, calls its `run()`, turns what it raises into a sentence and an exit code.

    `huge_pages`: of a command that trains, or scores many pairs.
    """

    def call():
        args = parse(cls, name, sys.argv[1:] if argv is None else argv)
        if huge_pages and argv is None:
            use_huge_pages()
        return _checked(args).run()

    return _guard(call)


def main_with_commands(commands: dict[str, type], name: str) -> int:
    """Like `main`, for a command with sub-commands."""

    def call():
        words = sys.argv[1:]
        if not words or words[0] in ("-h", "--help"):
            for word, cls in commands.items():
                print(f"python -m {name} {word}  {(cls.__doc__ or '').splitlines()[0]}")
            return 0
        if words[0] not in commands:
            near = difflib.get_close_matches(words[0], commands, 1, cutoff=0.0)
            raise UserError(f"Unknown command {words[0]!r}; did you mean {near[0]!r}?")
        return _checked(parse(commands[words[0]], f"{name} {words[0]}", words[1:])).run()

    return _guard(call)


def _checked(args):
    """The parsed flags of a command that may begin: UserError where XLA would end it."""
    if why := xla_flags.unfit():
        raise UserError(why)
    return args


def _guard(call: Callable[[], int | None]) -> int:
    prepare_output()
    lend_home()
    value: list[int | None] = []

    code, message = outcome(lambda: value.append(call()))
    tell(code, message)
    return code or value[0] or 0


def prepare_output() -> None:
    """Sends the log to stdout, without lines of libraries about failures that this project reports itself."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("ifvit").setLevel(logging.INFO)
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they log tracebacks of Orbax's writes that fail
    # In Ray's workers JAX would log every platform that is not there.
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("jax._src.xla_bridge").addFilter(in_one_line)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ✓ shall not stop a command


def log_to_stderr() -> None:
    """Sends the log to stderr, for commands whose stdout other programs read."""
    for name in ("", "ifvit"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)


def tell(code: int, message: str) -> None:
    """Prints on stderr how a command ended."""
    if message:
        print(message if code in (75, 130) else f"Error: {message}", file=sys.stderr, flush=True)


def outcome(call: Callable[[], object], tried_again: bool = False) -> tuple[int, str]:
    """Calls `call`, and returns (exit code, message) where it ends as expected.

    Any other exception is raised: it is a defect, or a host is gone. `tried_again`: this process is started again when
    it raises. Then errors that another start may avoid are raised too.
    """
    try:
        call()
        return 0, ""
    except UserError as e:
        return 2, str(e)
    except Interrupted as e:
        return e.code, str(e)
    except Failure as e:
        return 1, str(e)
    except KeyboardInterrupt:
        return 130, "Stopped without saving; the same command goes on from the last checkpoint."
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except (RuntimeError, AssertionError) as e:  # JAX's errors are of these classes
        if str(e).startswith("RESOURCE_EXHAUSTED"):
            return 1, FULL_DEVICE.format(str(e).splitlines()[0][:200])
        known = explained(e)
        if known is None or (known.again and tried_again):
            raise
        return known.code, known.sentence
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        return 1, (
            f"{e.strerror}: {e.filename or 'the disk'}; free or give another place (IFVIT_CACHE moves the cache, "
            "--checkpoint_dir the checkpoints)."
        )


@dataclasses.dataclass(frozen=True)
class _UnraisableHook:
    """Calls the hook before it, and leaves out one message.

    TensorStore gives that message when one of Orbax's writes has failed and the others still report to it.
    """

    before: Callable

    def __call__(self, told) -> None:
        if not (told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"):
            self.before(told)


def use_huge_pages() -> None:
    """Starts this command again with malloc asking Linux for huge pages.

    XLA on CPU allocates its large temporaries anew at every step; faulting them in by 4 kB pages took
    a quarter of a training step's time. glibc reads the setting at the start of a process only.
    """
    if sys.platform == "linux" and not os.environ.get("GLIBC_TUNABLES"):
        sys.stdout.flush()
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        )


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs on the disk, so that a second run starts training in seconds.

    Where the disk has no room it warns, and every start compiles anew.
    """
    import jax

    try:
        os.makedirs(folder, exist_ok=True)
        disk = shutil.disk_usage(folder)
        # On a full disk JAX leaves cut files, and fails to read them ever after.
        if disk.total and disk.free < ROOM_FOR_PROGRAMS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
        logging.getLogger("ifvit").warning(
            "Compiled programs are not kept, every start compiles anew: the cache %s cannot be written (%s). "
            "Set IFVIT_CACHE to a folder that can.",
            folder,
            e.strerror,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
