"""Reads RAY_ADDRESS as people set it: it says which Ray a run goes to."""

import os

from cluster.host import ClusterError

VARIABLE = "RAY_ADDRESS"
REMEDY = "unset it, give HOST:6379 (what `ray start --head` prints), or --runtime local"

DASHBOARD = "the address of Ray's dashboard, for `ray job submit`"
OTHERS = {"http": DASHBOARD, "https": DASHBOARD, "ray": "an address of Ray Client, which cannot run a training"}


def given() -> bool:
    """Whether RAY_ADDRESS names anything; blanks do not."""
    return bool(os.environ.get(VARIABLE, "").strip())


def alone() -> bool:
    """Whether a run has a Ray of its own, on this machine only."""
    return ray_address() == "local"


def ray_address() -> str:
    """HOST:PORT, `auto` (the Ray that runs on this machine), or `local`: a Ray of the run's own.

    ClusterError where RAY_ADDRESS is something else.
    """
    address = os.environ.get(VARIABLE, "").strip()
    if address in ("", "local", "auto"):
        return address or "local"
    scheme, separator, _ = address.partition("://")
    if separator:
        raise ClusterError(f"{VARIABLE}={address} is {OTHERS.get(scheme, 'no address of a Ray cluster')}; {REMEDY}.")
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ClusterError(f"{VARIABLE}={address} has no port; {REMEDY}.")
    good_port = port.isdecimal() and 0 < int(port) < 65536
    good_host = host and not set(host) & set(" ,/@") and (":" not in host or (host[0], host[-1]) == ("[", "]"))  # IPv6
    if not (good_host and good_port):
        raise ClusterError(f"{VARIABLE}={address} is not HOST:PORT; {REMEDY}.")
    return address


def host_and_port(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host without its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
