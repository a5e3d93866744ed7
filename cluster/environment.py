"""Sets variables of the environment. An empty variable counts as not set."""

import os


def set_default(name: str, value: str) -> None:
    """Sets a variable that is not set."""
    if not os.environ.get(name):
        os.environ[name] = value
