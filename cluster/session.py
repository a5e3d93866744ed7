"""A connection to Ray: to the cluster of RAY_ADDRESS, or to one of this machine alone."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import ray

from cluster import places, private
from cluster.address import REMEDY, VARIABLE, host_and_port, ray_address
from cluster.cores import NICENESS
from cluster.environment import set_default
from cluster.host import PREEMPTED, ClusterError
from cluster.proxies import reach_directly

# The workers get the driver's variables that begin so, because they compile the same programs into the same caches.
PASSED_ON = ("JAX_", "XLA_", "LIBTPU_", "NCCL_")


@contextlib.contextmanager
def session(cores: int | None = None, **how) -> Iterator[bool]:
    """A block in which this process is connected to Ray. Its value: whether Ray runs on this machine alone.

    `cores`: how many cores a Ray of this machine alone may use; None: all it finds. `how`: other arguments of
    `ray.init`. ClusterError where nobody answers.
    """
    address = ray_address()
    alone = address == "local"
    if VARIABLE in os.environ:  # Ray reads it too, and cannot deal with blanks and line ends around it
        os.environ[VARIABLE] = "" if alone else address
    hosts = [socket.gethostname(), ray.util.get_node_ip_address()]
    if not alone and address != "auto":
        hosts.append(host_and_port(address)[0])
        _answers(address)
    reach_directly(hosts)
    where = {"address": address}
    if alone:
        where |= {
            "include_dashboard": False,
            "_system_config": private.SYSTEM_CONFIG,
            "num_cpus": cores,
        } | places.of_ray()
    set_default("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a variable that the Ray job sets too shall be no conflict
    set_default(NICENESS, "0")  # for the workers of a Ray that is started here
    main = threading.current_thread() is threading.main_thread()
    before = main and signal.getsignal(signal.SIGTERM)  # Ray sets its own
    try:
        with _without_modules_of_others():
            ray.init(**where, log_to_driver=True, logging_level=logging.WARNING, **how)
    except (ConnectionError, ValueError) as e:
        if alone:
            raise ClusterError(
                f"Ray cannot be started on this machine ({_one_line(e)[:500]}); --runtime local does without it."
            ) from None
        if address == "auto":
            raise ClusterError(
                f"{VARIABLE}=auto, and no Ray runs on this machine; start one (ray start --head), or {REMEDY}."
            ) from None
        raise ClusterError(
            f"Ray cannot be reached at {VARIABLE}={address} ({_one_line(e)[:500]}); start it there (ray "
            f"start --head), or {REMEDY}."
        ) from None
    except SystemExit:  # Ray's own answer to SIGTERM
        _stop()
    except (RuntimeError, ray.exceptions.AuthenticationError) as e:  # another version of Ray or Python, or no token
        if alone:
            raise
        raise ClusterError(f"Ray at {address} refuses this process: {_one_line(e)[:500]}") from None
    if main:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield alone
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process is ending already
        ray.shutdown()
        if main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _without_modules_of_others() -> Iterator[None]:
    """Changes to a folder without modules for a while, unless the current one is where this package lies.

    Ray lets its workers look for modules in the current folder first. They would take a cluster.py there for this
    package.
    """
    here = os.getcwd()
    try:
        if not os.path.samefile(here, Path(__file__).parent.parent):
            os.chdir("/")
        yield
    finally:
        os.chdir(here)


def _stop(*_) -> NoReturn:
    """Ends the process at a SIGTERM that comes while nothing trains."""
    print("Stopped; the same command goes on.", flush=True)
    sys.exit(PREEMPTED)


def passed_on(variables: Iterable[str] = ()) -> dict[str, str]:
    """The part of the driver's environment that its workers need. `variables`: the beginnings of more names."""
    return {k: v for k, v in os.environ.items() if k.startswith((*PASSED_ON, *variables))}


def _answers(address: str, seconds: float = 15) -> None:
    """ClusterError where no Ray answers at HOST:PORT within `seconds`. Ray itself would try for minutes."""
    until = time.monotonic() + seconds
    tls = os.environ.get("RAY_USE_TLS", "0") not in ("", "0")  # its certificates are Ray's affair
    while True:
        try:
            socket.create_connection(host_and_port(address), timeout=5).close()
            if tls or private.is_ray(address):
                return
            why = (
                f"What answers at {VARIABLE}={address} is not Ray's coordinator, whose port is 6379 where nobody "
                "chose another"
            )
        except OSError as e:
            why = (
                f"Nobody answers at {VARIABLE}={address} ({e.strerror or e}); start Ray there (ray start --head), "
                "or mend the address"
            )
        if time.monotonic() > until:
            raise ClusterError(f"{why}: {REMEDY}.")
        time.sleep(1)


def _one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
