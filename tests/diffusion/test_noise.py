import numpy as np
import pytest

from jaxdiff.diffusion import noise

SHAPE = (8, 8, 4)
SEEDS = np.array([7, 0, 2**32 - 1, 8], np.uint32)
# torch.randn(21, generator=torch.Generator("cpu").manual_seed(1234)), PyTorch 2.13: a whole block
# of 16, and a last one drawn anew over the last 16 places.
TORCH_1234 = [
    *(-0.1117185652256012, -0.49659010767936707, 0.16307370364665985, -0.8816877603530884),
    *(0.05390019342303276, 0.4898708462715149, -0.38527461886405945, -0.7120345830917358),
    *(0.6369126439094543, -0.7140800952911377, -1.0831243991851807, -0.5547242164611816),
    *(0.971684992313385, 0.6969805359840393, -0.6630538702011108, 1.215756893157959),
    *(-2.5273351669311523, 1.477784276008606, -0.16962362825870514, -0.9918573498725891),
    -1.4569084644317627,
]


@pytest.mark.parametrize("kind", noise.KINDS)
def test_an_images_noise_is_its_seeds_alone(kind):
    batch = np.asarray(noise.draw(SEEDS, SHAPE, kind))
    for seed, drawn in zip(SEEDS, batch, strict=True):
        alone = np.asarray(noise.draw(np.array([seed]), SHAPE, kind))[0]
        np.testing.assert_array_equal(drawn, alone)
    assert len({drawn.tobytes() for drawn in batch}) == len(SEEDS)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise_is_standard_normal(kind):
    values = np.asarray(noise.draw(np.arange(64, dtype=np.uint32), (16, 16, 4), kind))
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.01


def test_torchs_noise_is_reproduced():
    np.testing.assert_allclose(noise.torch_normal(1234, 21), TORCH_1234, atol=5e-7)


def test_torchs_noise_is_laid_out_channels_first():
    drawn = noise.draw(np.array([3], np.uint32), (4, 6, 2), "torch")[0]
    flat = noise.torch_normal(3, 48)
    np.testing.assert_array_equal(drawn.transpose(2, 0, 1).reshape(-1), flat)


def test_sizes_that_torch_draws_in_another_way_are_refused():
    with pytest.raises(ValueError, match="from 16 on"):
        noise.torch_normal(0, 15)
