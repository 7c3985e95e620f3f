"""The model in Python: prompts in several forms, seeds, latents, streams and saved images."""

import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.diffusion import noise
from jaxdiff.images import image_files
from jaxdiff.request import Source, derived_seed

pytestmark = pytest.mark.usefixtures("compiled_faster")
FAST = {"steps": 2, "sampler": "ddim"}
PROMPT = "a ring, ünd"


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return jaxdiff.load(tiny_checkpoint)


def seeds(images):
    return [image.request.seed for image in images]


def pixels(images):
    return np.stack([image.pixels for image in images])


def test_equal_prompts_give_different_images_and_equal_calls_equal_ones(model):
    images = model.generate(["a ring", jaxdiff.Request(prompt="a ring"), "a ring"], **FAST)
    assert seeds(images) == [derived_seed(0, str(number), 0) for number in range(3)]
    assert len({image.pixels.tobytes() for image in images}) == 3
    assert {(image.request.prompt, image.request.steps) for image in images} == {("a ring", 2)}
    alone = model.generate("a ring", **FAST)
    np.testing.assert_array_equal(pixels(alone), pixels(images[:1]))


def test_the_images_of_a_prompt_have_seeds_like_those_of_a_row(model):
    said = jaxdiff.Request(prompt="a star", seed=7, guidance_scale=3)
    images = model.generate(["a ring", said], num_images=2, guidance_scale=5, **FAST)
    assert [image.request.prompt for image in images] == ["a ring"] * 2 + ["a star"] * 2
    assert seeds(images) == [derived_seed(0, "0", 0), derived_seed(0, "0", 1), 7, 8]
    assert [image.request.guidance_scale for image in images] == [5, 5, 3, 3]
    assert seeds(model.generate(["a ring"] * 2, seed=5, num_images=2, **FAST)) == [5, 6, 5, 6]
    assert seeds(model.generate(["a ring", said], seeds=np.array([3, 9]), **FAST)) == [3, 9]
    assert model.generate([]) == []


def test_latents_are_returned_and_noise_is_taken(model):
    (image,) = model.generate("a ring", seed=7, **FAST)
    (latents,) = model.generate("a ring", seed=7, output="latents", **FAST)
    assert (latents.shape, latents.dtype) == ((8, 8, 4), np.float32)
    assert 0.1 < latents.std() < 10
    drawn = np.asarray(noise.draw(np.array([7, 8], np.uint32), (8, 8, 4), "jax").start)
    given = model.generate("a ring", seed=1, num_images=2, latents=drawn, **FAST)
    # Drawn in a batch of another size, without the compiler's optimizations: not the same bits.
    np.testing.assert_allclose(given[0].pixels.astype(int), image.pixels, atol=1)
    assert np.abs(given[1].pixels.astype(int) - image.pixels).max() > 9
    mixed = [jaxdiff.Request(prompt="a ring", seed=7), jaxdiff.Request(prompt="", latents=drawn[0])]
    together = model.generate(mixed, **FAST)
    np.testing.assert_array_equal(together[0].pixels, image.pixels)


def test_a_stream_of_any_mixture_is_in_order_and_reads_few_prompts_ahead(model):
    asked = []

    def prompts():
        for number in itertools.count():
            asked.append(
                jaxdiff.Request(prompt=f"{number} rings", width=32 + 32 * (number % 3 > 1))
            )
            yield asked[-1]

    images = [*itertools.islice(model.stream(prompts(), batch_size=2, **FAST), 24)]
    assert [image.request.prompt for image in images] == [f"{n} rings" for n in range(24)]
    assert {image.pixels.shape for image in images} == {(64, 64, 3), (64, 32, 3)}
    assert seeds(images) == [derived_seed(0, str(number), 0) for number in range(24)]
    assert len(asked) <= 24 + 16
    (alone,) = model.generate(images[17].request)
    np.testing.assert_array_equal(alone.pixels, images[17].pixels)


def test_progress_counts_images_of_all_sizes_as_they_are_made(model):
    asked = [jaxdiff.Request(prompt="a ring", width=32 + 32 * (n % 2), **FAST) for n in range(6)]
    told = []
    images = model.generate(asked, progress=lambda *counts: told.append(counts))
    assert told == [(done, 6) for done in range(1, 7)]
    assert [image.request.width for image in images] == [32, 64] * 3


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("a ring", {"step": 2}, "unknown setting step; did you mean steps?"),
        ("a ring", {"prompt_": "a"}, "unknown setting prompt_"),
        ({"prompt": "a ring"}, {}, "prompts must be texts or jaxdiff.Requests, not {"),
        (None, {}, "prompts must be texts or jaxdiff.Requests, not None"),
        (["a ring", 3], {}, "a prompt must be text or a jaxdiff.Request, not 3"),
        ("a ring", {"num_images": 0}, "num_images must be a whole number from 1 to"),
        ("a ring", {"seeds": [1, 2]}, "seeds must have one value for each of 1 images, not 2"),
        ("a ring", {"seeds": 1, "num_images": 2}, "seeds must have one value for each of 2"),
        ("a ring", {"seed": 2**32 - 1, "num_images": 2}, "seed must be a whole number from 0 to"),
        ("a ring", {"latents": np.zeros((1, 4, 8, 8))}, "latents must be floats [8, 8, 4] (height"),
        ("a ring", {"latents": np.zeros((1, 8, 8, 4), int)}, "not int64 [8, 8, 4]"),
        ("a ring", {"output": "latent"}, "output must be images or latents, not 'latent'"),
    ],
)
def test_what_cannot_be_used_is_named(model, prompts, arguments, message):
    with pytest.raises(jaxdiff.InputError) as caught:
        model.generate(prompts, **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": None, "steps": 0}, "steps must be a whole number from 1 to 100000, not 0"),
        ({"prompt": 7}, "prompt must be text, not 7"),
        ({"prompt": "\udc80"}, "prompt contains the byte 0x80"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1"),
        ({"width": 0}, "width must be a whole number from 1 to 8192, not 0"),
        ({"guidance_scale": "high"}, "guidance_scale must be a number from 0 to 1000"),
        ({"sampler": 1}, "sampler must be text, not 1"),
        ({"strength": 2}, "strength must be a number from 0 to 1, not 2"),
        ({"outpaint": (8, 8)}, 'outpaint must have the form "left,top,right,bottom"'),
        ({"ip_adapter_scale": [11]}, "ip_adapter_scale must be a number from 0 to 10, not 11"),
    ],
)
def test_a_request_is_checked_at_once(wrong, message):
    with pytest.raises(jaxdiff.InputError) as caught:
        jaxdiff.Request(**{"prompt": "a ring", **wrong})
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def image(model):
    return model.generate(PROMPT, seed=3, **FAST)[0]


def test_an_image_is_shown_by_notebooks_and_short_in_print(image):
    assert repr([image]) == "[<Image 64x64, 'a ring, \\xfcnd', seed=3>]"
    assert repr(replace(image, finite=False)).endswith(", seed=3, not finite>")
    np.testing.assert_array_equal(np.asarray(image.pil()), image.pixels)
    shown = Image.open(io.BytesIO(image._repr_png_()))
    np.testing.assert_array_equal(np.asarray(shown), image.pixels)


def test_a_saved_image_says_how_it_was_made(image, tmp_path):
    for ending in ("png", "webp", "jpg"):
        image.save(tmp_path / f"a.{ending}")
    for ending in ("png", "webp"):
        content = (tmp_path / f"a.{ending}").read_bytes()
        np.testing.assert_array_equal(image_files.decode(content), image.pixels)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.text["Description"] == PROMPT
        assert "Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 3" in saved.text["parameters"]
        settings = json.loads(saved.text["jaxdiff"])
    request = {name: said for name, said in vars(image.request).items() if said is not None}
    assert settings == request
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.getexif()[image_files.IMAGE_DESCRIPTION].encode("latin-1").decode() == PROMPT
    with pytest.raises(jaxdiff.InputError, match=r"a\.gif: the name must end in one of \.png, "):
        image.save(tmp_path / "a.gif")
    assert not (tmp_path / "a.gif").exists()


def test_a_saved_image_says_that_it_was_made_of_another(image, tmp_path):
    ways = (image.pixels, "a.png", Source("a.png", "0"))
    for way in ways:
        changed = replace(image, request=replace(image.request, image=way, strength=0.5))
        changed.save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as saved:
            assert image_files.EDITED in saved.text[image_files.XMP_KEYWORD]
            assert json.loads(saved.text["jaxdiff"])["strength"] == 0.5
    clear = replace(image, pixels=np.zeros((8, 8, 4), np.uint8))
    clear.save(tmp_path / "clear.jpg")
    assert np.asarray(Image.open(tmp_path / "clear.jpg")).min() == 255


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "python.md"
    monkeypatch.chdir(tmp_path)
    images, _ = page.read_text("utf-8").split("\n## Datasets\n")
    examples = re.findall(r"^```python\n(.*?)^```", images, re.M | re.S)
    exec(compile("\n".join(examples), str(page), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == "1/2\n2/2\n"
    written = {"circle.png", "0.webp", "1.webp", "2.webp"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_the_module_offers_its_names_and_loads_little():
    code = (
        "import jaxdiff, sys\n"
        "print(*dir(jaxdiff), jaxdiff.__version__)\n"
        "assert not {'jax', 'apache_beam', 'PIL', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = sorted([*jaxdiff.__all__, "__version__"])
    assert done.stdout.split() == [*names, jaxdiff.__version__]
    assert all(hasattr(jaxdiff, name) for name in names)
