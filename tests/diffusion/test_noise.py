import numpy as np
import pytest

from jaxdiff.diffusion import noise

SHAPE = (8, 8, 4)
SEEDS = np.array([7, 0, 2**32 - 1, 8], np.uint32)
# torch.randn(21, generator=torch.Generator("cpu").manual_seed(1234)), PyTorch 2.13: a whole block
# of 16, then the last 16 values drawn again.
TORCH_1234 = [
    *(-0.1117185652256012, -0.49659010767936707, 0.16307370364665985, -0.8816877603530884),
    *(0.05390019342303276, 0.4898708462715149, -0.38527461886405945, -0.7120345830917358),
    *(0.6369126439094543, -0.7140800952911377, -1.0831243991851807, -0.5547242164611816),
    *(0.971684992313385, 0.6969805359840393, -0.6630538702011108, 1.215756893157959),
    *(-2.5273351669311523, 1.477784276008606, -0.16962362825870514, -0.9918573498725891),
    -1.4569084644317627,
]
# The last six values of the same generator's next call.
TORCH_1234_AGAIN = [
    *(1.1333558559417725, 0.8504235148429871, 1.0533899068832397, 0.36917850375175476),
    *(0.06279586255550385, -0.329674631357193),
]


@pytest.mark.parametrize("kind", noise.KINDS)
def test_an_images_noise_depends_only_on_its_seed(kind):
    batch, fresh = map(np.asarray, noise.draw(SEEDS, SHAPE, kind, draws=2)[:2])
    assert fresh.shape == (2, len(SEEDS), *SHAPE)
    for i, seed in enumerate(SEEDS):
        alone, fresh_alone, _ = noise.draw(np.array([seed]), SHAPE, kind, draws=2)
        np.testing.assert_array_equal(batch[i], alone[0])
        np.testing.assert_array_equal(fresh[:, i], fresh_alone[:, 0])
    drawn = [*batch, *fresh.reshape(-1, *SHAPE)]
    assert len({one.tobytes() for one in drawn}) == 3 * len(SEEDS)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise_does_not_depend_on_the_number_of_draws(kind):
    start, none, _ = noise.draw(SEEDS, SHAPE, kind)
    assert none is None
    drawn = (noise.draw(SEEDS, SHAPE, kind, draws) for draws in (1, 5))
    starts, fresh, _ = zip(*drawn, strict=True)
    for other in starts:
        np.testing.assert_array_equal(start, other)
    np.testing.assert_array_equal(fresh[0], fresh[1][:1])


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise_is_standard_normal(kind):
    for values in noise.draw(np.arange(64, dtype=np.uint32), (16, 16, 4), kind, draws=1)[:2]:
        values = np.asarray(values)
        assert values.dtype == np.float32
        assert abs(values.mean()) < 0.02
        assert abs(values.std() - 1) < 0.02
        assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.01


def test_torchs_noise_is_reproduced():
    first, second = noise.torch_normal(1234, [21, 21])
    np.testing.assert_allclose(first, TORCH_1234, atol=5e-7)
    np.testing.assert_allclose(second[-6:], TORCH_1234_AGAIN, atol=5e-7)


def test_torchs_noise_is_laid_out_channels_first():
    start, fresh, _ = noise.draw(np.array([3], np.uint32), (4, 6, 2), "torch", draws=2)
    drawn = np.stack([start[0], *fresh[:, 0]])
    flat = np.stack(noise.torch_normal(3, [48] * 3))
    np.testing.assert_array_equal(drawn.transpose(0, 3, 1, 2).reshape(3, -1), flat)


def test_sizes_that_torch_draws_differently_are_rejected():
    with pytest.raises(ValueError, match="at least 16"):
        noise.torch_normal(0, [16, 15])


def test_a_second_pass_has_noise_of_its_own_but_torchs_begins_anew():
    size = 16 * 16 * 4
    for kind, independent in (("jax", True), ("torch", False)):
        drawn = [
            noise.draw(SEEDS, (16, 16, 4), kind, draws=1, again=again) for again in (False, True)
        ]
        for first, second in zip(*(each[:2] for each in drawn), strict=True):
            first, second = (np.asarray(each).reshape(-1, size) for each in (first, second))
            if independent:
                assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
            else:
                np.testing.assert_array_equal(first, second)
        start, fresh = (np.asarray(each).ravel() for each in drawn[1][:2])
        assert abs(np.corrcoef(start, fresh)[0, 1]) < 0.1
