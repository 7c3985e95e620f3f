"""What this host's processor can do. Imports no JAX."""

import functools
from pathlib import Path


@functools.cache
def features() -> frozenset[str]:
    """Returns the names of its features as Linux spells them, such as "avx2"; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").partition(":")[2].split())
