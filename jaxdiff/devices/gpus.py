"""GPUs: what each can do, and its description for XLA, which compiles for it without it."""

from typing import NamedTuple

RUNTIME, CUDNN = "12.8.0", (9, 10, 0)  # versions that a described GPU is taken to have


class Gpu(NamedTuple):
    """A kind of NVIDIA GPU, with the numbers of NVIDIA's pages and programming guide.

    Attributes:
      name: as the driver gives it.
      capability: its compute capability, major and minor.
      multiprocessors: their number.
      ghz: its clock.
      bandwidth: of its memory, in bytes per second.
      cache_bytes: its second-level cache.
      shared_bytes: the shared memory of a multiprocessor.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    ghz: float
    bandwidth: float
    cache_bytes: int
    shared_bytes: int


A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2.04e12, 40 * 2**20, 164 * 2**10)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 3.35e12, 50 * 2**20, 228 * 2**10)
H200 = H100._replace(name="NVIDIA H200", bandwidth=4.8e12)


def description(gpu: Gpu, memory_bytes: int) -> str:
    """Returns XLA's `GpuTargetConfigProto` of a GPU as text.

    Args:
      gpu: the kind.
      memory_bytes: its memory.
    """
    major, minor = gpu.capability
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": gpu.shared_bytes,
        "shared_memory_per_block_optin": gpu.shared_bytes - 2**10,  # the rest is the system's
        "threads_per_core_limit": 2048,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": 128 if major == 9 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache_bytes,
        "clock_rate_ghz": gpu.ghz,
        "device_memory_size": memory_bytes,
        "device_address_bits": 64,
    }
    texts = {
        "name": gpu.name,
        "device_vendor": "NVIDIA Corporation",
        "platform_version": f"Compute Capability {major}.{minor}",
        "driver_version": RUNTIME,
        "runtime_version": RUNTIME,
        "compile_time_toolkit_version": RUNTIME,
        "dnn_version": ".".join(map(str, CUDNN)),
    }
    fields = [f"{name}: {value}" for name, value in numbers.items()]
    fields += [f'{name}: "{value}"' for name, value in texts.items()]
    fields += [f"cuda_compute_capability {{ major: {major} minor: {minor} }}"]
    versions = " ".join(
        f"{name}: {value}" for name, value in zip(("major", "minor", "patch"), CUDNN, strict=True)
    )
    return (
        f"gpu_device_info {{ {' '.join(fields)} }}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ {versions} }}\n'
        f'device_description_str: "{gpu.name}"\n'
    )
