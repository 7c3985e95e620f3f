"""CLIP for evaluation: its directories, its embeddings, and the measures based on them."""

import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import clips
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import InputError
from jaxdiff.evaluation import clip_checkpoint, clip_measures

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return clips.write_transformers(tmp_path_factory.mktemp("clip") / "tiny", clips.OPENAI)


@pytest.fixture(scope="module")
def referee(directory) -> clip_measures.Clip:
    return clip_measures.open_clip(directory, batch_size=2)


def test_an_images_embedding_does_not_depend_on_the_batch(referee):
    images = clips.images()
    found = referee.embed_images(iter(images))
    assert found.shape == (5, 24) == (5, referee.width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(referee.embed_images(images[::-1]), found[::-1])
    assert referee.embed_images([]).shape == referee.embed_texts([]).shape == (0, 24)


def test_a_texts_embedding_does_not_depend_on_the_batch(referee):
    texts = ["a star", "a red ring", "a star", "two crosses"]
    found = referee.embed_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(referee.embed_texts(texts[::-1]), found[::-1])
    assert abs(found[0] - found[1]).max() > 0.01


def test_long_texts_are_truncated_before_the_end_token(referee):
    room = 24 - 2  # the tiny model has 24 positions
    fits, same, shorter = ("one " * words for words in (room, 3 * room, room - 1))
    found = referee.embed_texts([fits, same, shorter])
    np.testing.assert_array_equal(found[0], found[1])
    assert abs(found[0] - found[2]).max() > 1e-3


def test_a_label_is_the_mean_of_its_templates(referee):
    templates = ("a {}", "a red {} and a {}")
    found = referee.embed_labels(["star", "ring"], templates)
    texts = referee.embed_texts(["a star", "a red star and a star"]).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found[0], texts / np.linalg.norm(texts), atol=1e-6)
    assert found.shape == (2, 24)


def test_the_last_clip_is_cached(directory, referee):
    assert clip_measures.open_clip(str(directory), batch_size=2) is clip_measures.open_clip(
        directory, batch_size=2
    )


def test_name_and_files_identify_a_clip(directory, referee, tmp_path):
    copy = clip_checkpoint.find(shutil.copytree(directory, tmp_path / "copy"))
    other = clip_checkpoint.find(clips.write_transformers(tmp_path / "other", clips.OPEN_CLIP))
    assert (referee.name, copy.name) == ("tiny", "copy")
    assert referee.fingerprint == copy.fingerprint != other.fingerprint


@pytest.mark.parametrize("config", [clips.OPENAI, clips.OPEN_CLIP], ids=["OpenAI", "OpenCLIP"])
def test_open_clips_files_give_the_same_network(config, tmp_path):
    ours = clip_checkpoint.find(clips.write_transformers(tmp_path / "transformers", config))
    theirs = clip_checkpoint.find(clips.write_open_clip(tmp_path / "open_clip", config))
    assert theirs.config == ours.config
    assert theirs.pixels == ours.pixels
    assert theirs.tensors.keys() == ours.tensors.keys()
    for key, tensor in ours.tensors.items():
        np.testing.assert_array_equal(theirs.tensors[key].read(), tensor.read(), err_msg=key)


def test_weights_may_be_sharded(directory, tmp_path):
    stored = clip_checkpoint.find(directory)
    sharded = shutil.copytree(directory, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    places = {}
    for number, keys in enumerate(np.array_split(sorted(stored.tensors), 2)):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({key: stored.tensors[key].read() for key in keys}, sharded / name)
        places |= dict.fromkeys(keys.tolist(), name)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = clip_checkpoint.find(sharded)
    assert {*found.files} >= {index.name, *places.values()}
    for key, tensor in stored.tensors.items():
        np.testing.assert_array_equal(found.tensors[key].read(), tensor.read())


def test_in_an_old_config_the_second_entry_of_an_encoder_counts(directory, tmp_path):
    old = shutil.copytree(directory, tmp_path / "old")
    edit(
        "config.json",
        text_config={"hidden_size": 1},
        text_config_dict=config_of(old)["text_config"],
    )(old)
    edit("preprocessor_config.json", size=32, crop_size=32)(old)
    assert clip_checkpoint.find(old).config == clips.OPENAI


def test_a_hub_id_in_the_cache_is_opened_without_a_network(directory, tmp_path):
    """Uses a new process because huggingface_hub reads the environment when it is imported."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--clip"
    shutil.copytree(directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from jaxdiff.evaluation import clip_checkpoint\n"
        "found = clip_checkpoint.find('someone/clip')\n"
        "print(found.name, found.fingerprint)"
    )
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["someone/clip", clip_checkpoint.find(directory).fingerprint]


def test_only_the_needed_files_of_a_repository_are_fetched(directory, tmp_path):
    besides = ["README.md", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"]
    open_clip = clips.write_open_clip(tmp_path / "open_clip", clips.OPENAI)
    for kind in (directory, open_clip):
        names = sorted(clip_checkpoint.find(kind).files)
        assert sorted(clip_checkpoint.wanted_files([*names, *besides])) == names
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    sharded = ["config.json", "model.safetensors.index.json", *shards]
    assert sorted(clip_checkpoint.wanted_files([*sharded, *besides])) == sorted(sharded)


# Damaged directories and the resulting errors.


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def edit(name: str, **changes):
    """Returns a function that changes values in a JSON file; dictionaries are merged."""

    def change(directory: Path) -> None:
        whole = json.loads((directory / name).read_text())
        for key, value in changes.items():
            inner = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = whole[key] | value if inner else value
        (directory / name).write_text(json.dumps(whole))

    return change


def without(name: str):
    return lambda directory: (directory / name).unlink()


def reweighed(name: str, change):
    def rewrite(directory: Path) -> None:
        weights = load_file(directory / name)
        change(weights)
        save_file(weights, directory / name)

    return rewrite


def as_integers(weights: dict) -> None:
    weights["transformer.resblocks.0.attn.in_proj_weight"] = np.zeros((96, 32), np.int32)


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


CONFIG, OPEN_CONFIG = "config.json", "open_clip_config.json"
PIXELS, WEIGHTS = "preprocessor_config.json", "model.safetensors"
OPEN_WEIGHTS = "open_clip_model.safetensors"
BROKEN = {
    "no weights": (without(WEIGHTS), "tiny has neither config.json with model.safetensors nor"),
    "no pixels": (without(PIXELS), "preprocessor_config.json is missing"),
    "no tokenizer": (without("merges.txt"), "lacks tokenizer.json"),
    "cut short": (cut_short, "model.safetensors has .* bytes, but its header implies"),
    "no JSON": (
        lambda directory: (directory / CONFIG).write_text("{"),
        "config.json cannot be read as JSON",
    ),
    "another architecture": (
        edit(CONFIG, model_type="siglip"),
        "config.json: model_type = 'siglip' is not CLIP",
    ),
    "no object": (edit(CONFIG, vision_config=[1]), "vision_config is not a JSON object"),
    "another activation": (
        edit(CONFIG, vision_config={"hidden_act": "relu"}),
        "config.json: vision_config: hidden_act = 'relu' is not supported",
    ),
    "a text for a number": (
        edit(CONFIG, text_config={"hidden_size": "32"}),
        "config.json: text_config: hidden_size = '32' is not supported",
    ),
    "another width": (
        edit(CONFIG, projection_dim=25),
        "of the wrong shape .*text_projection.weight .24, 32. instead of .25, 32.",
    ),
    "too many layers": (
        edit(CONFIG, text_config={"num_hidden_layers": 10**9}),
        "num_hidden_layers = 1000000000 is too large for its .* weights",
    ),
    "too large an image": (
        edit(CONFIG, vision_config={"image_size": 10**30}),
        "image_size = 1000000000000000000000000000000 is too large",
    ),
    "a weight too few": (
        reweighed(WEIGHTS, lambda weights: weights.pop("visual_projection.weight")),
        "1 missing .visual_projection.weight",
    ),
    "a weight too many": (
        reweighed(WEIGHTS, lambda weights: weights.update(head=np.zeros(3, np.float32))),
        "1 unknown .head",
    ),
    "another crop": (
        edit(PIXELS, crop_size={"height": 31, "width": 31}),
        "preprocessor_config.json: crop_size = .* is not supported .only",
    ),
    "another filter": (edit(PIXELS, resample=2), "resample = 2 is not supported .only 3 is"),
    "two channels": (edit(PIXELS, image_mean=[0.5, 0.5]), r"\[0.5, 0.5\] is not a mean"),
    "an absurd mean": (edit(PIXELS, image_mean=[10**400, 0, 0]), "is not a mean"),
    "no deviation": (edit(PIXELS, image_std=[0.5, 0.5, 0.0]), "deviation must be above 0, not 0.0"),
    "another vocabulary": (
        edit(CONFIG, text_config={"eos_token_id": 7}),
        "641 tokens and end token 640, but the text encoder has 641 and 7",
    ),
}
OPEN_BROKEN = {
    "no configs": (edit(OPEN_CONFIG, model_cfg=3), "open_clip_config.json has no model_cfg"),
    "another tower": (
        edit(OPEN_CONFIG, model_cfg={"vision_cfg": {"timm_model_name": "vit"}}),
        "vision_cfg with timm_model_name = 'vit' is not supported",
    ),
    "a ResNet": (
        edit(OPEN_CONFIG, model_cfg={"vision_cfg": {"layers": [3, 4, 6, 3]}}),
        r"vision_cfg with layers = \[3, 4, 6, 3\] is not supported",
    ),
    "half a layer": (
        edit(OPEN_CONFIG, model_cfg={"text_cfg": {"layers": 2.5, "width": 32}}),
        "num_hidden_layers = 2.5 is not supported",
    ),
    "an absurd width": (
        edit(OPEN_CONFIG, model_cfg={"text_cfg": {"width": 10**400}}),
        "text_cfg with width = 1000",
    ),
    "squashed": (
        edit(OPEN_CONFIG, preprocess_cfg={"resize_mode": "squash"}),
        "resize_mode = 'squash' is not supported .only 'shortest' is",
    ),
    "a weight too few": (
        reweighed(OPEN_WEIGHTS, lambda weights: weights.pop("visual.proj")),
        "1 missing .visual.proj",
    ),
    "no thirds": (
        reweighed(
            OPEN_WEIGHTS,
            lambda weights: weights.update(
                {"transformer.resblocks.0.attn.in_proj_bias": np.zeros(95, np.float32)}
            ),
        ),
        r"resblocks.0.attn.in_proj_bias has the wrong shape \[95\]",
    ),
    "integers": (reweighed(OPEN_WEIGHTS, as_integers), "in_proj_weight is stored as I32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_directory_gives_a_one_line_error(directory, tmp_path, case):
    broken = shutil.copytree(directory, tmp_path / "tiny")
    refuses(broken, *BROKEN[case])


@pytest.mark.parametrize("case", OPEN_BROKEN)
def test_a_damaged_open_clip_directory_gives_a_one_line_error(tmp_path, case):
    refuses(clips.write_open_clip(tmp_path / "tiny", clips.OPENAI), *OPEN_BROKEN[case])


def refuses(directory: Path, damage, message: str) -> None:
    damage(directory)
    with pytest.raises(InputError, match=message) as caught:
        clip_measures.open_clip(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_embeddings_that_overflow_give_a_one_line_error(directory, tmp_path):
    broken = shutil.copytree(directory, tmp_path / "tiny")
    reweighed(WEIGHTS, lambda weights: weights["visual_projection.weight"].fill(3e38))(broken)
    with pytest.raises(InputError, match="CLIP 'tiny' returns values that are not finite"):
        clip_measures.open_clip(broken, batch_size=2).embed_images(clips.images())


def test_a_path_that_is_not_a_directory_gives_a_one_line_error(directory):
    for name in ("nowhere", str(directory / "config.json")):
        with pytest.raises(InputError, match="is not a directory; name one that"):
            clip_measures.open_clip(name)


# Pixels.


def test_the_shortest_side_is_resized_and_the_centre_cropped():
    wide = np.random.default_rng(0).integers(0, 256, (50, 110, 3), dtype=np.uint8)
    resized = Image.fromarray(wide).resize((70, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((19, 0, 51, 32)))
    np.testing.assert_array_equal(clip_measures.centre_of_resized(wide, 32), expected)
    tall = wide.transpose(1, 0, 2)
    assert clip_measures.centre_of_resized(tall, 32).shape == (32, 32, 3)


# Measures.


def unit(*shape: int) -> np.ndarray:
    vectors = np.random.default_rng(len(shape)).standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_clip_score_is_a_hundred_cosines_and_never_below_zero():
    images, texts = unit(50, 4), np.roll(unit(50, 4), 1, axis=0)
    cosines = [np.dot(image, text) for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(
        clip_measures.clip_score(images, texts), [100 * max(c, 0) for c in cosines], rtol=1e-12
    )
    assert min(cosines) < 0
    assert clip_measures.clip_score(images[0], images[0]) == pytest.approx(100)


def test_directional_similarity_is_the_cosine_of_the_changes():
    a, b, c, d = unit(4, 6, 5)
    expected = [
        np.dot(q - p, s - r) / (np.linalg.norm(q - p) * np.linalg.norm(s - r))
        for p, q, r, s in zip(a, b, c, d, strict=True)
    ]
    np.testing.assert_allclose(
        clip_measures.directional_similarity(a, b, c, d), expected, rtol=1e-12
    )
    assert clip_measures.directional_similarity(a[0], a[0], c[0], d[0]) == 0


def test_probabilities_of_labels_are_a_softmax():
    images, labels = unit(6, 5), unit(3, 5)
    found = clip_measures.zero_shot(images, labels, 100.0)
    powers = np.exp(100.0 * images @ labels.T)
    np.testing.assert_allclose(found, powers / powers.sum(axis=1)[:, None], rtol=1e-9)


def test_diversity_is_the_mean_over_all_pairs():
    images = unit(7, 5)
    expected = np.mean([1 - a @ b for a, b in combinations(images, 2)])
    assert clip_measures.diversity(images) == pytest.approx(expected, rel=1e-12)
    assert clip_measures.diversity(np.repeat(images[:1], 3, axis=0)) == pytest.approx(0, abs=1e-12)
    assert np.isnan(clip_measures.diversity(images[:1]))


def test_near_duplicates_are_counted_with_their_neighbour():
    images = np.eye(5)
    assert clip_measures.near_duplicates(images) == 0
    images[3] = images[1] + 0.1 * images[2]
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    assert clip_measures.near_duplicates(images) == 2 / 5
    assert clip_measures.near_duplicates(images, threshold=0.999) == 0
    assert np.isnan(clip_measures.near_duplicates(images[:1]))
