"""The engine with a random model: what an image depends on, and what it does not."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from cases import further

import jaxdiff
from jaxdiff import checks, request
from jaxdiff.diffusion import noise
from jaxdiff.engine import embeddings, engine, sampler
from jaxdiff.errors import InputError

pytestmark = pytest.mark.usefixtures("compiled_faster")

REQUESTS = [
    jaxdiff.Request(
        prompt=f"{color} {shape}", seed=seed, steps=3, guidance_scale=scale, negative_prompt=avoid
    )
    for seed, (color, shape, scale, avoid) in enumerate(
        [
            ("a red", "circle", 3.0, ""),
            ("a blue", "star", 5.0, "a red circle"),
            ("a red", "circle", 2.0, ""),
            ("an orange", "ring", 7.5, ""),
            ("a cyan", "cross", 3.0, "blurry"),
        ]
    )
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return jaxdiff.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def images(model):
    return model.generate(REQUESTS, batch_size=4)


def pixels(images):
    return np.stack([image.pixels for image in images])


def test_threads_may_share_a_model(tiny_checkpoint, images):
    shared = jaxdiff.load(tiny_checkpoint)
    orders = [REQUESTS, REQUESTS[::-1], REQUESTS[2:] + REQUESTS[:2]]
    with ThreadPoolExecutor(len(orders)) as pool:
        made = list(pool.map(lambda order: shared.generate(order, batch_size=4), orders))
    expected = {image.request.seed: image.pixels for image in images}
    for image in itertools.chain(*made):
        np.testing.assert_array_equal(image.pixels, expected[image.request.seed])


def test_images_are_8_bit_rgb_of_the_models_size(images):
    assert all(image.pixels.shape == (64, 64, 3) for image in images)
    assert all(image.pixels.dtype == np.uint8 for image in images)
    assert all(image.finite for image in images)
    assert [image.request.prompt for image in images] == [r.prompt for r in REQUESTS]
    assert len({image.pixels.tobytes() for image in images}) == len(images)


def test_planning_and_the_engine_have_the_same_names():
    named = [*request.FIELDS, *request.IMAGE_FIELDS, "latents"]
    assert sorted(named) == sorted(field.name for field in fields(request.Request))
    assert noise.KINDS == checks.NOISES
    assert tuple(engine.DTYPES) == checks.DTYPES
    assert set(request.OPTION_CHECKS) == {field.name for field in fields(request.Options)}


def test_order_and_other_images_of_the_batch_do_not_change_an_image(model, images):
    shuffled = model.generate([REQUESTS[i] for i in (4, 2, 0, 3, 1)], batch_size=4)
    np.testing.assert_array_equal(pixels(shuffled), pixels(images)[[4, 2, 0, 3, 1]])


def test_padding_does_not_change_an_image(model, images):
    alone = model.generate(REQUESTS[1:2], batch_size=4)
    np.testing.assert_array_equal(alone[0].pixels, images[1].pixels)


def test_seed_prompt_guidance_and_negative_prompt_each_change_the_image(model, images):
    changed = [
        replace(REQUESTS[1], seed=99),
        replace(REQUESTS[1], prompt="a green square"),
        replace(REQUESTS[1], guidance_scale=6.0),
        replace(REQUESTS[1], negative_prompt="a white background"),
    ]
    for image in model.generate(changed, batch_size=4):
        assert (image.pixels != images[1].pixels).any()


@pytest.fixture(scope="session")
def compiled():
    """A list with an entry for each program that is compiled or fetched from the cache."""
    events = []

    def listen(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


def test_new_prompts_seeds_guidance_scales_and_samplers_need_no_compilation(
    model, images, compiled
):
    before = len(compiled)
    model.generate([replace(REQUESTS[0], seed=5, prompt="new", guidance_scale=9.0)], batch_size=4)
    model.generate([replace(REQUESTS[0], sampler="euler")], batch_size=4)
    assert len(compiled) == before


def test_each_size_is_compiled_once(model, images, compiled):
    sizes = [(64, 64), (72, 40), (64, 64), (40, 72), (72, 40)] * 2
    requests = [replace(REQUESTS[0], width=w, height=h, steps=3) for w, h in sizes]
    before = len(compiled)
    for image, (width, height) in zip(model.generate(requests, batch_size=4), sizes, strict=True):
        assert image.pixels.shape == (height, width, 3)
    wide_and_high = len(compiled) - before
    assert wide_and_high >= 2
    model.generate([replace(request, seed=9) for request in requests], batch_size=4)
    assert len(compiled) - before == wide_and_high


def test_expected_requests_are_compiled_while_loading(tiny_checkpoint, images, compiled):
    model = jaxdiff.load(tiny_checkpoint, expecting={REQUESTS[0]: 8})
    made = model.generate(REQUESTS[:1])  # waits for the compilations in progress
    np.testing.assert_array_equal(made[0].pixels, images[0].pixels)
    before = len(compiled)
    model.generate(REQUESTS)
    assert len(compiled) == before


def test_another_process_reuses_compiled_programs(tiny_checkpoint, tmp_path):
    """Counts the hits and misses of JAX's cache on disk from its monitoring events."""
    code = (
        "import jax, jaxdiff, sys\n"
        "jax.monitoring.register_event_listener(lambda event, **_: print(event))\n"
        f"model = jaxdiff.load({str(tiny_checkpoint)!r})\n"
        "model.generate([jaxdiff.Request(prompt='a red circle', steps=2)])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_P")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def misses_and_hits() -> tuple[int, int]:
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        events = ran.stdout.splitlines()
        return tuple(
            events.count(f"/jax/compilation_cache/cache_{what}") for what in ("misses", "hits")
        )

    misses, hits = misses_and_hits()
    assert misses > 0
    assert hits == 0
    missed, found = misses_and_hits()
    assert missed == 0
    assert found >= misses  # two threads that need a program at the same time both look it up
    (folder,) = (tmp_path / "jaxdiff" / "xla").iterdir()
    assert folder.stat().st_mode & 0o077 == 0


def test_decoding_in_turns_changes_at_most_the_last_bit(tiny_checkpoint, images, monkeypatch):
    monkeypatch.setattr(sampler, "DECODED_PX", 64 * 64)
    in_turns = jaxdiff.load(tiny_checkpoint).generate(REQUESTS, batch_size=4)
    assert np.abs(pixels(in_turns).astype(int) - pixels(images)).max() <= 1


def test_guidance_is_on_only_in_its_interval(tiny_checkpoint, model, images):
    def pixels_with(**options):
        return pixels(jaxdiff.load(tiny_checkpoint, **options).generate(REQUESTS, batch_size=4))

    never = [replace(request, guidance_scale=1.0) for request in REQUESTS]
    unguided = pixels(model.generate(never, batch_size=4))
    np.testing.assert_array_equal(pixels_with(guidance_stop=0), unguided)
    np.testing.assert_array_equal(pixels_with(guidance_start=1), unguided)
    partly = pixels_with(guidance_start=0.3, guidance_stop=0.7)
    assert (partly != unguided).any()
    assert (partly != pixels(images)).any()


def test_a_model_may_refine_itself(tiny_checkpoint, images):
    """DDIM has no history, so the switch of denoisers has no effect."""
    model = jaxdiff.load(tiny_checkpoint, refiner=tiny_checkpoint, refiner_start=0.5)
    difference = pixels(model.generate(REQUESTS, batch_size=4)).astype(int) - pixels(images)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        *({"clip_skip": 1}, {"prompt_chunks": 2}, {"deep_cache": 2}),
        *map(further, ({"guidance_rescale": 0.7}, {"eta": 0.5})),
    ],
    ids=str,
)
def test_an_option_changes_the_image_independently_of_the_batch(tiny_checkpoint, images, options):
    model = jaxdiff.load(tiny_checkpoint, **options)
    together = pixels(model.generate(REQUESTS, batch_size=4))
    assert (together != pixels(images)).any()
    alone = model.generate(REQUESTS[2:3], batch_size=4)[0].pixels
    np.testing.assert_array_equal(alone, together[2])


def test_another_models_tokenizer_is_rejected(tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "mixed")
    added = {"added_tokens_decoder": {"641": {"content": "<new>", "special": True}}}
    path = directory / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    with pytest.raises(InputError, match="has 642 tokens, but text_encoder has only 641"):
        jaxdiff.load(directory)


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        ("unet", {"in_channels": 8}, "in_channels = 8 does not fit .* need 4"),
        ("unet", {"out_channels": 8}, "out_channels = 8 does not fit .* need 4"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim = 64 does not fit .* need 32"),
        ("vae", {"out_channels": 4}, "out_channels = 4 must be 3"),
    ],
)
def test_networks_that_do_not_fit_together_are_rejected(
    tiny_checkpoint, tmp_path, network, change, message
):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "mixed")
    path = directory / network / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        jaxdiff.load(directory)


def test_the_cache_of_embeddings_has_a_limit(model, images, monkeypatch):
    monkeypatch.setattr(embeddings, "CACHED_BYTES", 3 * images[0].pixels.nbytes)
    (encoder,) = (denoiser.prompts for denoiser in model._sampler._denoisers)
    many = [replace(REQUESTS[0], prompt=f"a ring {i}") for i in range(30)]
    model.generate([*many, *REQUESTS], batch_size=4)
    assert 0 < len(encoder._cache[0]) < 20
    again = model.generate(REQUESTS, batch_size=4)
    np.testing.assert_array_equal(pixels(again), pixels(images))


def test_unloaded_text_encoders_come_to_the_device_once_for_many_prompts(
    model, tiny_checkpoint, monkeypatch
):
    many = [replace(REQUESTS[0], prompt=f"{number} rings") for number in range(20)]
    unloading = jaxdiff.load(tiny_checkpoint, text_encoders="unload")
    (encoder,) = (denoiser.prompts for denoiser in unloading._sampler._denoisers)
    monkeypatch.setattr(embeddings, "HELD_BYTES", 16 * 24 * 32 * 4)  # of 16 prompts
    assert unloading.prompts_at_once(unloading.resolve(many[0]), 8) == 8
    came, bring = [], encoder._on_devices
    monkeypatch.setattr(encoder, "_on_devices", lambda: came.append(1) or bring())
    found = [unloading.generate(many), [*unloading.stream(many)]]
    # For the prompts of 8, 8 and 4 images and the empty negative one; then for those forgotten.
    assert len(came) == 4 + 3
    expected = pixels(model.generate(many))
    for made in found:
        np.testing.assert_array_equal(pixels(made), expected)


def test_the_cache_of_images_has_a_limit(model, monkeypatch):
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (20, 64, 64, 3), np.uint8)
    many = [replace(REQUESTS[0], image=picture, strength=0.7) for picture in pictures]
    first = model.generate(many, batch_size=4)
    assert len({image.pixels.tobytes() for image in first}) == 20
    monkeypatch.setattr(embeddings, "CACHED_BYTES", 10 * 2 * 8 * 8 * 4 * 4)  # of ten images
    again = model.generate(many[::-1], batch_size=4)
    assert len(model._sampler._inputs.encoder._cache) == 10
    np.testing.assert_array_equal(pixels(again)[::-1], pixels(first))


def test_plain_images_of_two_sizes_are_not_taken_for_each_other():
    wide, tall = (np.zeros(shape, np.uint8) for shape in ((32, 64, 3), (64, 32, 3)))
    assert embeddings.digest(wide) != embeddings.digest(tall)


def test_the_end_of_a_long_prompt_matters_only_with_more_chunks(tiny_checkpoint, model):
    long = replace(REQUESTS[0], prompt="a red circle and a blue star " * 4)
    requests = [long, replace(long, prompt=long.prompt + "on a white background")]
    cut = pixels(model.generate(requests, batch_size=4))
    np.testing.assert_array_equal(cut[0], cut[1])
    whole = pixels(jaxdiff.load(tiny_checkpoint, prompt_chunks=2).generate(requests, batch_size=4))
    assert (whole[0] != whole[1]).any()


def test_without_guidance_the_negative_prompt_has_no_effect(model):
    plain = [
        replace(REQUESTS[0], guidance_scale=scale, negative_prompt=text)
        for scale, text in [(1.0, ""), (1.0, "a star"), (0.0, "")]
    ]
    first, second, third = model.generate(plain, batch_size=4)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.pixels, third.pixels)


def test_sizes_mix_in_one_call_and_stay_in_order(model):
    wide = replace(REQUESTS[0], width=72, height=40)
    mixed = model.generate([REQUESTS[0], wide, REQUESTS[2]], batch_size=4)
    assert [image.pixels.shape for image in mixed] == [(64, 64, 3), (40, 72, 3), (64, 64, 3)]


def test_torch_noise_gives_another_image(tiny_checkpoint, images):
    other = jaxdiff.load(tiny_checkpoint, noise="torch").generate(REQUESTS[:1], batch_size=4)
    assert (other[0].pixels != images[0].pixels).any()


def test_bfloat16_gives_nearly_the_same_image(tiny_checkpoint, images):
    half = jaxdiff.load(tiny_checkpoint, dtype="bfloat16").generate(REQUESTS, batch_size=4)
    difference = np.abs(pixels(half).astype(int) - pixels(images).astype(int))
    assert 0 < difference.mean() < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mesh": "data=3,model=two"}, "write it as data=4"),
        ({"mesh": "data=4096"}, "needs 4096 devices"),
        ({"dtype": "float8"}, "float32, bfloat16"),
        ({"noise": "numpy"}, "jax, torch"),
        ({"eta": 1.5}, "eta must be a number from 0 to 1"),
        ({"clip_skip": 3}, "text_encoder has only 2 layers"),
    ],
)
def test_bad_arguments_of_load_are_named(tiny_checkpoint, arguments, message):
    with pytest.raises(InputError, match=message):
        jaxdiff.load(tiny_checkpoint, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 60}, "width"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"sampler": "magic"}, "sampler"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": 7}, "prompt"),
    ],
)
def test_bad_requests_are_named(model, change, message):
    with pytest.raises(InputError, match=message):
        model.generate([replace(REQUESTS[0], **change)], batch_size=4)
