"""Reaches the hosts of a run directly, whatever proxy the environment names for the rest of the world.

Most clusters set http_proxy and https_proxy. JAX's coordination service uses gRPC, which then asks the proxy even for
hosts of the same rack, and waits for ever. The proxies themselves stay, because gs:// may need them.
"""

import os
from collections.abc import Iterable

NAMES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
HERE = ("localhost", "127.0.0.1", "::1")


def reach_directly(hosts: Iterable[str]) -> None:
    """Lets this process, and those it starts, reach these hosts and this one without a proxy.

    It must be called before they connect.
    """
    if not any(value for name, value in os.environ.items() if name.lower() in NAMES):
        return
    both = _words("no_proxy") | _words("NO_PROXY")  # Python reads the second only where there is no first
    hosts = dict.fromkeys((*HERE, *hosts))
    # gRPC reads no_grpc_proxy, and no_proxy where that is not set. It does not know `*`.
    os.environ["no_grpc_proxy"] = ",".join((_words("no_grpc_proxy") or both) | hosts)  # noqa: SIM112 (gRPC reads it so)
    if "*" not in both:  # `*` excepts all hosts already, but only where it stands alone
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(both | hosts)


def _words(name: str) -> dict[str, None]:
    """The hosts of a variable, in its order."""
    return dict.fromkeys(word.strip() for word in os.environ.get(name, "").split(",") if word.strip())
