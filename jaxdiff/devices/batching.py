"""Chooses how many images are computed at once."""

from collections.abc import Callable

# The last bits of XLA's CPU kernels depend on the size of their arrays. So a CPU computes this many
# pixels at once, whatever the batch size; larger images are computed singly, at no loss of speed.
CPU_BATCH_PX = 8 * 64 * 64
AUTO = "auto"
MOST = 64  # images on an accelerator; more would not keep it any busier
LEAST = 8  # images of 64x64 on a CPU
USED = 0.9  # of a device's memory; the rest is for prompts and what XLA does not count


def full(size: int, batch_size: int | str) -> int:
    """Rounds `size`, the images in a shard, down to full batches; "auto" counts as `LEAST`."""
    batch_size = LEAST if batch_size == AUTO else batch_size
    return max(1, size // batch_size) * batch_size


def on_cpu(width: int, height: int) -> int:
    """Returns a CPU's batch size for images of this size."""
    return max(1, CPU_BATCH_PX // (width * height))


def enough(images: int, parts: int) -> int:
    """Returns the smallest power of two, at most `MOST`, that is enough.

    With it, `parts` devices compute all images at once: the last batch is filled up with copies.
    """
    on_each = max(1, -(-images // parts))
    return min(1 << (on_each - 1).bit_length(), MOST)


def largest(
    memory: Callable[[int], int], limit: int, runs: Callable[[int], bool], most: int = MOST
) -> int:
    """Returns the largest batch size, a power of two, that fits on a device.

    Args:
      memory: maps a batch size to the bytes that its program takes. Each call compiles the program,
        so it is called only for 1, 2 and the sizes extrapolated from them.
      limit: the device's memory in bytes.
      runs: checks whether a batch of this size really runs; its answer is final.
      most: the largest batch size to try.

    Returns:
      at least 1, which is returned without a try.
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
