"""Targets name slices that exist; a process has the chips of one host."""

import pytest

from jaxdiff.devices import slices
from jaxdiff.errors import InputError


@pytest.mark.parametrize(
    ("target", "chips", "hosts", "sides"),
    [
        ("tpu-v5e:1x1", 1, 1, (1, 1, 1)),
        ("tpu-v5e:2x2", 4, 1, (2, 2, 1)),
        ("tpu-v5e:2x4", 8, 1, (2, 4, 1)),
        ("tpu-v6e:16x16", 256, 64, (2, 2, 1)),
        ("tpu-v5p:2x2x1", 4, 1, (2, 2, 1)),
        ("tpu-v5p:16x16x24", 6144, 1536, (2, 2, 1)),
        ("h100:8", 8, 1, (1, 1, 8)),
    ],
)
def test_a_slice_has_hosts_with_chips(target, chips, hosts, sides):
    found = slices.parse(target)
    assert (found.chips, found.hosts, found.host_sides) == (chips, hosts, sides)


@pytest.mark.parametrize(
    "target", ["v5e:2x2", "tpu-v5e", "tpu-v5e:", "tpu-v9:2x2", "tpu-v5e:2x", "tpu-h100:1"]
)
def test_a_target_is_written_in_one_way(target):
    with pytest.raises(InputError, match=r"write it as tpu-v5e:2x2 or h100:8; the chips are v5e, "):
        slices.parse(target)


@pytest.mark.parametrize("target", ["tpu-v5e:3x3", "tpu-v5e:2x2x1", "tpu-v6e:32x32", "tpu-v5p:2x2"])
def test_a_slice_must_exist(target):
    with pytest.raises(InputError, match=r"there is no such slice; v.. has (1x1|2x2x1), 2x2"):
        slices.parse(target)
