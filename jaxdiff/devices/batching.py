"""How many images are computed at once."""

from collections.abc import Callable

# XLA's kernels for CPUs depend on the size of their arrays, down to the last bit. There, so many
# pixels are computed at once whatever the batch size; larger images, alone, lose no speed by it.
CPU_BATCH_PX = 8 * 64 * 64
AUTO = "auto"
MOST = 64  # images on an accelerator, which more do not keep any busier
LEAST = 8  # a CPU's number for 64x64
USED = 0.9  # of a device's memory; the rest is for prompts, and for what XLA does not count


def full(size: int, batch_size: int | str) -> int:
    """The images of a shard of about `size` that consists of full batches, "auto" of `LEAST`."""
    batch_size = LEAST if batch_size == AUTO else batch_size
    return max(1, size // batch_size) * batch_size


def on_cpu(width: int, height: int) -> int:
    """A CPU's own batch size for images of so many pixels."""
    return max(1, CPU_BATCH_PX // (width * height))


def largest(
    memory: Callable[[int], int], limit: int, runs: Callable[[int], bool], most: int = MOST
) -> int:
    """The largest batch size, a power of two, that fits a device.

    Args:
      memory: a batch size to the bytes that its program takes. Asking compiles it, so it is asked
        of 1, of 2, and of what they lead to expect.
      limit: bytes of the device.
      runs: whether a batch of a size really runs, the final judge.
      most: no larger ones.

    Returns:
      at least 1, which is not tried.
    """
    if most == 1:
        return 1
    one = memory(1)
    each = max(1, memory(2) - one)
    room = 1 + max(0, int(USED * limit) - one) // each
    size = 1 << (min(room, most).bit_length() - 1)
    while size > 1 and not (memory(size) <= USED * limit and runs(size)):
        size //= 2
    return size
