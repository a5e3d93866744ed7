"""A connection to Ray: to the cluster of RAY_ADDRESS, or to one of this machine alone."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import ray

from cluster.cores import NICENESS
from cluster.environment import set_default
from cluster.host import PREEMPTED, ClusterError

QUIET = {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}  # of a Ray without a dashboard
# what is set for the driver holds for its workers: their programs and caches are the same
PASSED_ON = ("IFVIT_", "JAX_", "XLA_", "LIBTPU_", "NCCL_")


@contextlib.contextmanager
def session(cores: int | None = None, **how) -> Iterator[bool]:
    """Connected while it lasts; whether Ray runs on this machine alone, where it may use so many cores (None: all it finds).

    `how`: of `ray.init`. ClusterError where nobody answers.
    """
    alone = (os.environ.get("RAY_ADDRESS") or "local") == "local"
    if not alone:
        _answers(os.environ["RAY_ADDRESS"])
    where = {"address": "local", "include_dashboard": False, "_system_config": QUIET, "num_cpus": cores} if alone else {}
    set_default("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a variable that the job has too is no conflict
    set_default(NICENESS, "0")  # of workers of a Ray that is started here
    main = threading.current_thread() is threading.main_thread()
    before = main and signal.getsignal(signal.SIGTERM)  # Ray sets its own
    try:
        with _without_modules_of_others():
            ray.init(**where, log_to_driver=True, logging_level=logging.WARNING, **how)
    except (ConnectionError, ValueError) as e:
        raise ClusterError(f"Ray cannot be reached at {os.environ.get('RAY_ADDRESS', 'this machine')} "
                           f"({str(e).splitlines()[0]}); start it (ray start --head), or mend RAY_ADDRESS.") from None
    except SystemExit:  # Ray's own answer to SIGTERM
        _stop()
    except (RuntimeError, ray.exceptions.AuthenticationError) as e:  # another version of Ray or Python, or no token
        if alone:
            raise
        why = " ".join(line.strip() for line in str(e).splitlines() if line.strip())
        raise ClusterError(f"Ray at {os.environ['RAY_ADDRESS']} refuses this process: {why[:500]}") from None
    if main:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield alone
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
        ray.shutdown()
        if main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _without_modules_of_others() -> Iterator[None]:
    """In a folder without modules, unless the current one is where this package lies.

    Ray lets its workers look for modules in the current folder first: they would take a cluster.py there for this package.
    """
    here = os.getcwd()
    try:
        if not os.path.samefile(here, Path(__file__).parent.parent):
            os.chdir("/")
        yield
    finally:
        os.chdir(here)


def _stop(*_) -> NoReturn:
    """SIGTERM where nothing trains."""
    print("Stopped; the same command goes on.", flush=True)
    sys.exit(PREEMPTED)


def passed_on() -> dict[str, str]:
    """The driver's environment as far as its workers need it."""
    return {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}


def _answers(address: str, seconds: float = 15) -> None:
    """ClusterError where nobody listens at HOST:PORT for so long; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while port.isdigit() and "/" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as e:
            if time.monotonic() > until:
                raise ClusterError(f"Nobody answers at RAY_ADDRESS={address} ({e.strerror or e}); start Ray there (ray start "
                                   "--head), or mend the address.") from None
        time.sleep(1)
