"""Transformer families split over a mesh make the same images and exchange nothing over `data`."""

import numpy as np
import pytest
import small_families
from test_parallel import exchanging, made_on_eight_devices

import jaxdiff

ALONE, SPLIT, PARTS = "data=1", "data=2,model=4", 4
REQUESTS = [
    jaxdiff.Request(prompt=prompt, seed=seed, steps=2, width=64, height=64, guidance_scale=3.0)
    for seed, prompt in enumerate(["a red circle", "two blue stars", "", "a star"])
]


OPTIONS = {
    "Stable Diffusion 3": {"text_encoders": "host"},
    "Qwen-Image": {"weights": "int8"},
}


@pytest.fixture(
    scope="module",
    # Text encoders on the host have a test of their own.
    params=["Qwen-Image", pytest.param("Stable Diffusion 3", marks=pytest.mark.slow)],
)
def made(request, tmp_path_factory):
    """Returns, by mesh, the images and the programs of a small checkpoint."""
    family = request.param
    folder = tmp_path_factory.mktemp("mesh")
    checkpoint = small_families.save(small_families.SMALL[family], folder / "model")
    programs = folder / "programs"
    programs.mkdir()
    return made_on_eight_devices(checkpoint, programs, [ALONE, SPLIT], REQUESTS, **OPTIONS[family])


def test_a_mesh_makes_the_same_images_as_one_device(made, record_property):
    alone, split = (made[mesh][0].astype(int) for mesh in (ALONE, SPLIT))
    difference = np.abs(split - alone)
    record_property("difference", f"{difference.max()} {difference.mean():.5f}")
    assert difference.max() <= 2  # sums that are split over `model` round differently
    assert all(image.std() > 10 for image in alone)
    assert np.abs(alone[0] - alone[1]).max() > 50


def test_nothing_is_exchanged_over_data(made):
    for mesh, parts in ((ALONE, 1), (SPLIT, PARTS)):
        programs = made[mesh][1]
        assert any("convolution" in program for program in programs)
        groups = [group for program in programs for group in exchanging(program)]
        assert bool(groups) == (parts > 1)
        assert all(len({device // parts for device in group}) == 1 for group in groups)
