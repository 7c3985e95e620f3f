"""Each family's page gives the timesteps of diffusers' pipeline, for images of any size.

The numbers were printed by diffusers 0.42.1; tests/parity/test_flow_schedules.py compares with it.
"""

import numpy as np
import pytest

from jaxdiff.diffusion.samplers import FLOW_CLASS, sampler_table
from jaxdiff.families import FAMILIES
from jaxdiff.families.flow import empirical_mu, tokens
from jaxdiff.request import Bucket

DYNAMIC = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
QWEN_IMAGE = DYNAMIC | {
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
}
KLEIN = {"shift": 3.0, "use_dynamic_shifting": True}
CASES = [  # pipeline, scheduler, side in pixels, steps, first and last timesteps
    (
        *("FluxPipeline", DYNAMIC, 1024, 28),
        [1000, 988.4086, 976.2225],
        [195.4546, 104.7209],
    ),
    (
        *("FluxPipeline", DYNAMIC, 512, 28),
        [1000, 980.6559, 960.6438],
        [126.2038, 65.0196],
    ),
    (
        *("StableDiffusion3Pipeline", {"shift": 3.0}, 1024, 28),
        [1000, 987.3806, 974.1077],
        [110.9057, 8.9286],
    ),
    (
        *("ZImagePipeline", {"shift": 3.0}, 1024, 9),
        [1000, 960.0001, 913.0436, 857.1428, 789.4737],
        [705.8824, 599.9999, 461.5385, 272.7273],
    ),
    (
        *("Flux2KleinPipeline", KLEIN, 1024, 4),
        [1000, 967.384],
        [908.1439, 767.2],
    ),
    (
        *("Flux2KleinPipeline", KLEIN, 512, 4),
        [1000, 958.0854],
        [883.9819, 717.4966],
    ),
    (
        *("QwenImagePipeline", QWEN_IMAGE, 1024, 8),
        [1000, 916.024, 820.0458, 709.2946],
        [580.0748, 427.347, 244.0539, 20],
    ),
]


def timesteps(pipeline: str, scheduler: dict, width: int, height: int, steps: int) -> np.ndarray:
    bucket = Bucket(width, height, steps, False, "euler")
    config = {"_class_name": FLOW_CLASS, **scheduler}
    schedule = FAMILIES[pipeline].schedule(config, bucket)
    return sampler_table(bucket.sampler, schedule, steps).timesteps


@pytest.mark.parametrize(("pipeline", "scheduler", "side", "steps", "first", "last"), CASES)
def test_the_timesteps_are_those_of_the_pipeline(pipeline, scheduler, side, steps, first, last):
    found = timesteps(pipeline, scheduler, side, side, steps)
    assert len(found) == steps
    np.testing.assert_allclose(found[: len(first)], first, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found[-len(last) :], last, rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[2]}")
def test_the_shift_depends_on_the_number_of_pixels_and_on_no_side(case):
    """But for the static ones, which depend on neither."""
    pipeline, scheduler, side, steps, *_ = case
    square, wide, small = (
        timesteps(pipeline, scheduler, width, height, steps)
        for width, height in ((side, side), (2 * side, side // 2), (side // 2, side // 2))
    )
    np.testing.assert_array_equal(square, wide)
    is_dynamic = scheduler.get("use_dynamic_shifting", False)
    assert (square[1] > small[1]) == is_dynamic
    assert np.array_equal(square, small) != is_dynamic


def test_the_mu_of_flux_2_is_between_those_of_10_and_of_200_steps():
    assert tokens(Bucket(1024, 1024, 4, False, "euler")) == 4096
    assert empirical_mu(4096, 4) == pytest.approx(2.29118, abs=1e-5)
    assert empirical_mu(1024, 4) == pytest.approx(2.03069, abs=1e-5)
    assert empirical_mu(4096, 10) == pytest.approx(8.73809524e-05 * 4096 + 1.89833333)
    assert empirical_mu(4096, 200) == pytest.approx(0.00016927 * 4096 + 0.45666666)
