import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.stable_diffusion import PIPELINE, STABLE_DIFFUSION
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.text.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.weights.load import load_params, places
from jaxdiff.weights.network import Network, abstract_network
from jaxdiff.weights.save import save_params, save_pipeline

COMPONENTS = STABLE_DIFFUSION.components
CLASSES = {
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
    "unet": (UNet2DConditionModel, UNetConfig),
    "vae": (AutoencoderKL, AutoencoderKLConfig),
}


def config_and_shapes(directory, component):
    model_class, config_class = CLASSES[component]
    config = config_class.from_json(open_checkpoint(directory).config(component))
    return config, abstract_network(model_class, config)[1]


def test_a_network_is_traced_once_and_its_shapes_are_the_callers_own(tiny_checkpoint):
    config, shapes = config_and_shapes(tiny_checkpoint, "vae")
    wanted = jax.tree.leaves(shapes)
    shapes["decoder"].clear()
    graph, again = abstract_network(AutoencoderKL, config)
    assert jax.tree.leaves(again) == wanted
    assert abstract_network(AutoencoderKL, config)[0] is graph
    wider = replace(config, latent_channels=config.latent_channels + 1)
    assert jax.tree.leaves(abstract_network(AutoencoderKL, wider)[1]) != wanted


def test_shapes_do_not_keep_the_mesh_of_their_tracing():
    config = AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4, layers_per_block=3)
    mesh = jax.sharding.AbstractMesh((1, 1), ("data", "model"))
    with jax.sharding.use_abstract_mesh(mesh):
        _, shapes = abstract_network(AutoencoderKL, config)
    assert {leaf.sharding for leaf in jax.tree.leaves(shapes)} == {None}


def test_the_shapes_of_a_network_are_kept_for_the_next_process(
    tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, _ = config_and_shapes(tiny_checkpoint, "vae")
    wider = replace(config, latent_channels=config.latent_channels + 1)

    def facts(shapes: dict) -> dict:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)

    for asked in (config, wider):
        wanted = facts(abstract_network(AutoencoderKL, asked)[1])
        for _ in range(2):  # traced, and from the cache
            assert facts(Network(AutoencoderKL, asked, ()).shapes) == wanted
    assert len(list((tmp_path / "jaxdiff" / "networks").iterdir())) == 2


@pytest.fixture
def vae(tiny_checkpoint, tmp_path):
    """The shapes of an autoencoder, and a file with its weights that a test may modify."""
    _, shapes = config_and_shapes(tiny_checkpoint, "vae")
    file = tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    return shapes, Path(shutil.copyfile(file, tmp_path / "vae.safetensors"))


def edit(file, **changes):
    """Replaces tensors of a safetensors file; None removes a tensor."""
    tensors = load_file(file) | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


@pytest.mark.parametrize("component", CLASSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_saved_parameters_are_loaded_back(tiny_checkpoint, tmp_path, component, dtype):
    _, shapes = config_and_shapes(tiny_checkpoint, component)
    params = load_params(places(shapes, dtype), open_checkpoint(tiny_checkpoint).weights(component))
    save_params(params, tmp_path / "again.safetensors", dtype)
    again = load_params(
        places(shapes, dtype), read_weights(COMPONENTS[component], tmp_path / "again.safetensors")
    )
    assert jax.tree.structure(again) == jax.tree.structure(shapes)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_one_rule_transposes_kernels_and_renames_leaves(vae):
    shapes, file = vae
    params, tensors = (
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["vae"], file)),
        load_file(file),
    )
    encoder = params["encoder"]
    np.testing.assert_array_equal(
        encoder["conv_in"]["kernel"].transpose(3, 2, 0, 1), tensors["encoder.conv_in.weight"]
    )
    attention = encoder["mid_block"]["attentions"][0]
    key = "encoder.mid_block.attentions.0"
    np.testing.assert_array_equal(attention["to_q"]["kernel"].T, tensors[f"{key}.to_q.weight"])
    np.testing.assert_array_equal(
        attention["group_norm"]["scale"], tensors[f"{key}.group_norm.weight"]
    )


def test_parameters_have_the_requested_dtype_and_sharding(vae):
    shapes, file = vae
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for leaf in jax.tree.leaves(
        load_params(places(shapes, jnp.bfloat16, sharding), read_weights(COMPONENTS["vae"], file))
    ):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == sharding


def test_all_mismatches_are_counted_and_named_in_one_line(vae):
    shapes, file = vae
    edit(
        file,
        **{
            "decoder.conv_in.bias": None,
            "decoder.conv_norm_out.bias": None,
            "decoder.extra.weight": np.zeros(3, np.float32),
            "encoder.conv_in.weight": np.zeros((8, 3, 1, 1), np.float32),
        },
    )
    with pytest.raises(InputError) as caught:
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["vae"], file))
    message = str(caught.value)
    assert "\n" not in message
    assert "2 missing (decoder.conv_in.bias, decoder.conv_norm_out.bias)" in message
    assert "1 unknown (decoder.extra.weight)" in message
    assert (
        "1 of the wrong shape (encoder.conv_in.weight [8, 3, 1, 1] instead of [8, 3, 3, 3])"
        in message
    )


def test_weights_that_are_not_floats_are_refused(vae):
    shapes, file = vae
    edit(file, **{"encoder.conv_in.bias": np.zeros(8, np.int8)})
    with pytest.raises(InputError, match="I8"):
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["vae"], file))


def test_old_text_encoders_keys_are_read(tiny_checkpoint, tmp_path):
    _, shapes = config_and_shapes(tiny_checkpoint, "text_encoder")
    file = tiny_checkpoint / "text_encoder" / "model.safetensors"
    prefixed = load_file(file)
    assert all(key.startswith("text_model.") for key in prefixed)
    flat = {key.removeprefix("text_model."): value for key, value in prefixed.items()}
    old = tmp_path / "flat.safetensors"
    save_file(flat | {"embeddings.position_ids": np.arange(24)[None]}, old)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["text_encoder"], old)),
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["text_encoder"], file)),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_rejected(vae, value):
    shapes, file = vae
    bias = load_file(file)["decoder.conv_in.bias"].copy()
    bias[3] = value
    edit(file, **{"decoder.conv_in.bias": bias})
    message = r"vae\.safetensors: decoder\.conv_in\.bias contains NaN or infinity"
    with pytest.raises(InputError, match=message):
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["vae"], file))


def test_a_weight_beyond_the_dtype_is_rejected(vae):
    shapes, file = vae
    bias = load_file(file)["decoder.conv_in.bias"].astype(np.float64)
    bias[3] = 1e300
    edit(file, **{"decoder.conv_in.bias": bias})
    with pytest.raises(InputError, match=r"decoder\.conv_in\.bias contains NaN or infinity"):
        load_params(places(shapes, np.float32), read_weights(COMPONENTS["vae"], file))


def test_a_lora_that_makes_a_weight_infinite_is_named_as_the_cause(vae):
    shapes, file = vae
    tensors = read_weights(COMPONENTS["vae"], file)
    key = "decoder.conv_in.weight"
    update = SimpleNamespace(read=lambda: np.float32(np.inf))
    tensors[key] = replace(tensors[key], updates=(update,))
    with pytest.raises(InputError, match=r"conv_in\.weight is not finite with its LoRAs"):
        load_params(places(shapes, np.float32), tensors)


def test_a_weight_too_large_for_float16_is_not_saved_as_infinity(tmp_path):
    params = {"proj": {"kernel": np.full((2, 3), 1e6, np.float32)}}
    with pytest.raises(ValueError, match=r"proj\.kernel is not finite as float16"):
        save_params(params, tmp_path / "file.safetensors", np.float16)


@pytest.fixture(scope="module")
def parts(tiny_checkpoint):
    """The arguments of `save_pipeline` that reproduce the tiny checkpoint."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    configs, params = {}, {}
    for component in CLASSES:
        configs[component], shapes = config_and_shapes(tiny_checkpoint, component)
        params[component] = load_params(places(shapes, np.float32), checkpoint.weights(component))
    tokenizer = tiny_checkpoint / "tokenizer"
    return dict(
        components=COMPONENTS,
        pipeline={"_class_name": PIPELINE, **STABLE_DIFFUSION.absent},
        configs=configs,
        params=params,
        scheduler=checkpoint.config("scheduler"),
        tokenizers={"text_encoder": tokenizer},
    )


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_a_checkpoint_can_be_replaced_with_its_own_tokenizer(parts, copy):
    fingerprint = open_checkpoint(copy).fingerprint
    tokenizers = {"text_encoder": copy / "tokenizer"}
    save_pipeline(copy, **parts | {"tokenizers": tokenizers}, dtype=np.float32)
    assert open_checkpoint(copy).fingerprint == fingerprint
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_weights_are_float16_by_default_and_transformers_computes_in_float32(parts, tmp_path):
    save_pipeline(tmp_path / "half", **parts)
    half = open_checkpoint(tmp_path / "half")
    for component in CLASSES:
        assert {tensor.dtype for tensor in half.weights(component).values()} == {"F16"}
    assert half.config("text_encoder")["dtype"] == "float32"


def test_a_failed_save_leaves_the_old_checkpoint_alone(parts, copy):
    fingerprint = open_checkpoint(copy).fingerprint
    vae = parts["params"]["vae"] | {"quant_conv": {"bias": np.full(8, np.nan, np.float32)}}
    with pytest.raises(ValueError, match="quant_conv"):
        save_pipeline(copy, **parts | {"params": parts["params"] | {"vae": vae}})
    assert open_checkpoint(copy).fingerprint == fingerprint
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("name", ["thesis.tex", "."])
def test_other_directories_are_not_replaced(parts, tmp_path, name):
    (tmp_path / "thesis.tex").write_text("the only copy")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        save_pipeline(tmp_path / name, **parts)
    assert (tmp_path / "thesis.tex").read_text() == "the only copy"


def test_an_abstract_network_matches_the_one_that_flax_builds(tiny_checkpoint):
    model_class, config_class = CLASSES["unet"]
    config = config_class.from_json(open_checkpoint(tiny_checkpoint).config("unet"))
    graph, shapes = abstract_network(model_class, config)
    abstract = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    usual_graph, state = nnx.split(abstract)
    usual = nnx.to_pure_dict(state)
    assert graph == usual_graph
    assert jax.tree.structure(shapes) == jax.tree.structure(usual)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(usual)]
