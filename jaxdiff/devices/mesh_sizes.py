"""Reads the sizes of a device mesh from text. Imports no JAX."""

import re

from jaxdiff.errors import InputError


def mesh_sizes(spec: str | None, count: int) -> dict[str, int]:
    """Returns the sizes of the axes `data` and `model` of a mesh over a host's devices.

    Args:
      spec: for example "data=4,model=2", with any sizes; None uses every device for `data`.
      count: the number of devices.

    Raises:
      InputError: if `spec` cannot be parsed, or asks for more devices than there are.
    """
    if spec is None:
        return {"data": count, "model": 1}
    sizes = {}
    for part in spec.split(","):
        match = re.fullmatch(r"(data|model)=([1-9][0-9]{0,5})", part.strip())
        if match is None or match[1] in sizes:
            raise InputError(f"--mesh {spec}: write it as data=4 or data=4,model=2")
        sizes[match[1]] = int(match[2])
    sizes = {"data": 1, "model": 1, **sizes}
    needed = sizes["data"] * sizes["model"]
    if needed > count:
        raise InputError(f"--mesh {spec}: needs {needed} devices, but there are {count}")
    return sizes
