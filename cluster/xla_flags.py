"""Tries XLA_FLAGS in another process: a flag that XLA does not know ends a process at once, with pages of usage."""

import functools
import os
import re
import subprocess
import sys

# This lets XLA read its flags without looking for devices. It is a private name of jaxlib, checked on 0.10.
READ = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"
REFUSED = r"(Unknown flags? in XLA_FLAGS|Couldn't interpret value|Could not open file|Flag parsing failed).*"


def unfit() -> str:
    """A sentence with its remedy where XLA would end a process with this environment; else ''."""
    return _tried(os.environ.get("XLA_FLAGS", ""))


@functools.cache
def _tried(flags: str) -> str:
    if not flags.strip():
        return ""
    said = subprocess.run(
        [sys.executable, "-c", READ],
        env=os.environ | {"XLA_FLAGS": flags},
        text=True,
        errors="replace",
        capture_output=True,
    )
    told = re.search(REFUSED, said.stderr)
    if not said.returncode or not told:  # any other failure will show itself later, and more clearly
        return ""
    return f"XLA refuses XLA_FLAGS={flags} ({told[0].strip().rstrip('.')[:200]}); mend the flag, or unset the variable."
