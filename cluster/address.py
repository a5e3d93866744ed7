"""RAY_ADDRESS, as people set it: which Ray a run goes to."""

import os

from cluster.host import ClusterError

VARIABLE = "RAY_ADDRESS"
REMEDY = "unset it, give HOST:6379 (what `ray start --head` prints), or --runtime local"


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
        what = {"http": "the address of Ray's dashboard, for `ray job submit`", "https": "the address of Ray's dashboard, for `ray job submit`",
                "ray": "an address of Ray Client, which cannot run a training"}.get(scheme, "no address of a Ray cluster")
        raise ClusterError(f"{VARIABLE}={address} is {what}; {REMEDY}.")
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ClusterError(f"{VARIABLE}={address} has no port; {REMEDY}.")
    in_brackets = host.startswith("[") and host.endswith("]")  # of IPv6
    if not host or set(host) & set(" ,/@") or (":" in host and not in_brackets) or not (port.isdecimal() and 0 < int(port) < 65536):
        raise ClusterError(f"{VARIABLE}={address} is not HOST:PORT; {REMEDY}.")
    return address


def host_and_port(address: str) -> tuple[str, int]:
    """Those of a HOST:PORT; an IPv6 host without its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
