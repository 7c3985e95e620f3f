"""Single files with a transformer and no more: what is missing, wrong or of no use is named."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_flux import CONFIG, LAYER, NETWORKS, SCHEDULER, original, save_base, transformer

from jaxdiff.checkpoint import transformer_files
from jaxdiff.checkpoint.component import INDEX
from jaxdiff.checkpoint.weight_files import NoVariantError
from jaxdiff.errors import InputError
from jaxdiff.families import inspect, open_checkpoint
from jaxdiff.families.flux import PIPELINE
from jaxdiff.families.opening import open_ensemble
from jaxdiff.models.flux import FluxConfig
from pipelines import generate_options


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return transformer()


@pytest.fixture
def tensors(state) -> dict[str, np.ndarray]:
    return original(state)


@pytest.fixture
def write(tmp_path):
    """A function that writes tensors to a file with a meaningless name."""

    def write(tensors) -> Path:
        save_file(tensors, tmp_path / "download(3).safetensors")
        return tmp_path / "download(3).safetensors"

    return write


def refusal(model: Path, base: Path | None = None, **options) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(model, base=base, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_transformer_alone_names_what_is_missing_and_where_it_is(write, tensors):
    path = write(tensors)
    assert refusal(path) == (
        f"{path} is FLUX.1 dev without text_encoder, text_encoder_2, vae; take them from another "
        "model: --base black-forest-labs/FLUX.1-dev, or a local diffusers directory"
    )
    schnell = {key: each for key, each in tensors.items() if not key.startswith("guidance_in.")}
    assert "--base black-forest-labs/FLUX.1-schnell" in refusal(write(schnell))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_with_a_base_it_is_a_whole_model(write, tensors, state, base, prefix):
    path = write({prefix + key: tensor for key, tensor in tensors.items()})
    opened = open_checkpoint(path, base=base)
    assert opened.pipeline == PIPELINE
    assert opened.networks == ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert FluxConfig.from_json(opened.config("transformer")) == CONFIG
    assert opened.config("scheduler") == SCHEDULER
    assert opened.tokenizer("text_encoder_2") == base / "tokenizer_2"
    assert opened.files.keys() == {
        *("checkpoint.safetensors", INDEX, "scheduler/scheduler_config.json"),
        *(f"{network}/config.json" for network in NETWORKS),
        *(f"{network}/model.safetensors" for network in ("text_encoder", "text_encoder_2")),
        "vae/diffusion_pytorch_model.safetensors",
        *(f"tokenizer/{file.name}" for file in (base / "tokenizer").iterdir()),
        "tokenizer_2/tokenizer.json",
    }
    weights = opened.weights("transformer")
    assert weights.keys() == state.keys()
    for key, tensor in weights.items():
        np.testing.assert_array_equal(tensor.read(), state[key], err_msg=key)
    assert inspect.report(opened).splitlines()[-1].split() == ["usable", "yes"]


def test_a_base_of_another_family_is_refused(write, tensors, tiny_checkpoint):
    assert refusal(write(tensors), tiny_checkpoint) == (
        f"{tiny_checkpoint / INDEX}: 'StableDiffusionPipeline' is not supported; use a checkpoint "
        "of FluxPipeline"
    )


def test_a_base_is_refused_where_nothing_is_missing(tiny_checkpoint, base):
    message = f"model {str(tiny_checkpoint)!r} is a directory and needs no --base"
    assert message in refusal(tiny_checkpoint, base)
    with pytest.raises(InputError, match="needs no --base"):
        open_ensemble("shapes64", base=base)


def test_a_base_must_be_a_directory(write, tensors):
    path = write(tensors)
    assert "is not a diffusers directory or a Hub id" in refusal(path, path)
    assert "is not a diffusers directory or a Hub id" in refusal(path, path.with_name("nowhere"))


def test_of_a_remote_base_only_the_missing_parts_are_fetched(
    write, tensors, base, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    (whole / "transformer").mkdir()
    (whole / "transformer" / "diffusion_pytorch_model.safetensors").write_text("large")
    opened = open_checkpoint(write(tensors), base=f"file://{whole}")
    assert opened.fingerprint == open_checkpoint(opened.path, base=base).fingerprint
    fetched = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert fetched
    assert b"large" not in fetched


def test_a_base_that_lacks_the_parts_is_named(write, tensors, base, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    shutil.rmtree(copy / "vae")
    assert f"{copy}/vae/diffusion_pytorch_model.safetensors is missing" in refusal(
        write(tensors), copy
    )


def test_a_base_of_other_widths_does_not_fit(write, tensors, base):
    tensors["txt_in.weight"] = tensors["txt_in.weight"][:, :16]
    said = inspect.report(open_checkpoint(write(tensors), base=base)).splitlines()[-1]
    assert "joint_attention_dim = 16 does not fit the other networks, which need 32" in said


def test_a_variant_is_the_bases(write, tensors, base, tmp_path):
    path = write(tensors)
    with pytest.raises(NoVariantError):
        open_checkpoint(path, "fp16")
    with pytest.raises(NoVariantError, match="copy has no weights of the variant"):
        open_checkpoint(path, "fp16", Path(shutil.copytree(base, tmp_path / "copy")))
    file = tmp_path / "copy" / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("model.fp16.safetensors"))
    opened = open_checkpoint(path, "fp16", tmp_path / "copy")
    assert "text_encoder/model.fp16.safetensors" in opened.files


def test_missing_and_unknown_tensors_are_named(write, tensors, base):
    del tensors["double_blocks.1.txt_mlp.2.bias"]
    tensors["double_blocks.0.adapter"] = np.zeros(3, np.float32)
    message = refusal(write(tensors), base)
    assert "does not match FLUX.1 dev" in message
    assert "1 missing (double_blocks.1.txt_mlp.2.bias)" in message
    assert "1 unknown (double_blocks.0.adapter)" in message


def test_a_gap_between_blocks_is_named(write, tensors, base):
    moved = {key.replace("double_blocks.1.", "double_blocks.7."): t for key, t in tensors.items()}
    message = refusal(write(moved), base)
    assert "missing (double_blocks.1." in message
    assert "unknown (double_blocks.7." in message


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("img_in.weight", None, "img_in.weight is missing"),
        ("txt_in.weight", (128,), "txt_in.weight has the shape [128]"),
        (f"{LAYER}.weight", (385, 128), f"{LAYER}.weight has the wrong shape [385, 128]"),
        (f"{LAYER}.weight", (), f"{LAYER}.weight has the wrong shape []"),
        ("final_layer.adaLN_modulation.1.bias", (255,), "has the wrong shape [255]"),
        ("single_blocks.0.linear1.weight", (100, 128), "has the wrong shape [100, 128]"),
        ("img_in.weight", (128, 384), "takes 320 channels of an image beside the noise"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named(write, tensors, base, key, shape, message):
    tensors.pop(key)
    if shape is not None:
        tensors[key] = np.zeros(shape, np.float32)
    assert message in refusal(write(tensors), base)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("img_in.bias", (127,), "x_embedder.bias [127] instead of [128]"),
        (
            "double_blocks.0.img_attn.norm.query_norm.scale",
            (64,),
            "transformer_blocks.0.attn.norm_q.weight [64] instead of [128]",
        ),
    ],
)
def test_shapes_that_no_config_depends_on_are_checked(write, tensors, base, key, shape, message):
    tensors[key] = np.zeros(shape, np.float32)
    assert message in inspect.report(open_checkpoint(write(tensors), base=base))


def test_many_blocks_are_refused_at_once(write, tensors, base):
    for number in range(201):
        tensors[f"single_blocks.{number}.x"] = np.zeros(0, np.float32)
    assert "it has 201 single_blocks" in refusal(write(tensors), base)


def test_a_truncated_file_is_refused(write, tensors, base):
    path = write(tensors)
    path.write_bytes(path.read_bytes()[:-1])
    assert "but its header implies" in refusal(path, base)


@pytest.mark.parametrize("kind", transformer_files.FORMATS, ids=lambda kind: kind.name)
def test_every_kind_is_named_if_it_is_not_whole(write, kind):
    keys = [f"{probe}0.weight" if probe.endswith(".") else probe for probe in kind.probes]
    path = write({key: np.zeros(2, np.float32) for key in keys})
    assert f"{path} does not match {kind.name}: " in refusal(path)


def test_scaled_weights_are_read_as_products(write, tensors, state, base):
    """ComfyUI's scaled files: 8 bits and a scale for matrices, the rest as it was."""
    scales = {}
    for key, tensor in list(tensors.items()):
        if tensor.ndim == 2:
            scale = np.array(np.abs(tensor).max() / 448, np.float32)
            tensors[key] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            scales[f"{layer}.scale_weight"] = scale
            scales[f"{layer}.scale_input"] = np.ones((), np.float32)
    products = {
        key: tensor.astype(np.float32) * scales.get(f"{key[:-7]}.scale_weight", np.float32(1))
        for key, tensor in tensors.items()
    }
    marks = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    path = write(tensors | scales | marks)
    weights = open_checkpoint(path, base=base).weights("transformer")
    save_file(products, path.with_name("products.safetensors"))
    opened = open_checkpoint(path.with_name("products.safetensors"), base=base)
    expected = opened.weights("transformer")
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        np.testing.assert_array_equal(tensor.read(), expected[key].read(), err_msg=key)
        close = 0.07 * np.abs(state[key]) + np.abs(state[key]).max() / 448
        assert (np.abs(tensor.read() - state[key]) <= close).all()


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("distilled_guidance_layer.in_proj.bias", "a Chroma checkpoint"),
        ("transformer_blocks.0.attn.to_q.weight", "a single network"),
    ],
)
def test_other_kinds_of_files_are_named(write, tensors, key, what):
    path = write(tensors | {key: np.zeros(2, np.float32)})
    assert f"{path} is {what}; use a single file of a supported model" in refusal(path)


def test_plans_say_a_base_only_if_there_is_one():
    """Because earlier versions continue plans without one."""
    assert generate_options.Models("a").planned().keys() == {"model", "variant", "refiner", "lora"}
    assert generate_options.Models("a", base="b").planned()["base"] == "b"
