"""The hosts of a run are reached directly, whatever proxy the environment names for the rest of the world.

Most clusters set http_proxy and https_proxy. gRPC, which JAX's coordination service uses, asks for hosts of the same
rack through them then, and waits for ever. The proxies themselves stay: gs:// may need them.
"""

import os
from collections.abc import Iterable

NAMES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
HERE = ("localhost", "127.0.0.1", "::1")


def reach_directly(hosts: Iterable[str]) -> None:
    """No proxy for these hosts and this one, from this process and what it starts. To be called before they connect."""
    if not any(value for name, value in os.environ.items() if name.lower() in NAMES):
        return
    both = _words("no_proxy") | _words("NO_PROXY")  # Python reads the second only where there is no first
    hosts = dict.fromkeys((*HERE, *hosts))
    # gRPC reads no_grpc_proxy, and no_proxy where there is none; it knows no `*`
    os.environ["no_grpc_proxy"] = ",".join((_words("no_grpc_proxy") or both) | hosts)
    if "*" not in both:  # else all are excepted already, and a longer list would end that
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(both | hosts)


def _words(name: str) -> dict[str, None]:
    """The hosts of a variable, in its order."""
    return dict.fromkeys(word.strip() for word in os.environ.get(name, "").split(",") if word.strip())
