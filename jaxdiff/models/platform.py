"""The kind of device that a program is traced for."""

import jax


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": that of the mesh that is set, or else this host's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
