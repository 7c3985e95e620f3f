import json
import os
from pathlib import Path

import numpy as np
import pytest
from original import CONV_IN, REFINER, SD1, UNET, XL, shapes
from safetensors.numpy import save_file

from jaxdiff.checkpoint import single_file
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.diffusion.samplers import OF_SCHEDULER
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKLConfig
from jaxdiff.models.text.clip import CLIPTextConfig
from jaxdiff.models.unet import UNetConfig

# Other entries of real files.
NO_WEIGHTS = {
    "model_ema.diffusion_modelinput_blocks00weight": (2,),
    "model_ema.decay": (),
    "alphas_cumprod": (1000,),
    "alphas_cumprod_prev": (1000,),
    "sqrt_one_minus_alphas_cumprod": (1000,),
    "log_one_minus_alphas_cumprod": (1000,),
    "sqrt_recipm1_alphas_cumprod": (1000,),
    "betas": (1000,),
    "posterior_log_variance_clipped": (1000,),
    "posterior_mean_coef1": (1000,),
    "denoiser.sigmas": (1000,),
    "first_stage_model.loss.discriminator.main.0.weight": (2,),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.transformer.text_projection.weight": (2, 2),
    "cond_stage_model.logit_scale": (),
    "conditioner.embedders.1.model.logit_scale": (),
    "global_step": (),
}


@pytest.fixture
def write(tmp_path):
    """A function that writes tensors of the given shapes to a file with a meaningless name."""

    def write(shapes, dtype=np.float16, **metadata):
        path = tmp_path / "download(3).safetensors"
        tensors = {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
        save_file(tensors, path, metadata=metadata or None)
        return path

    return write


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        single_file.read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("width", CONTENTS)
def test_the_family_is_recognised_by_the_keys(write, width):
    read = single_file.read(write(shapes(width)))
    family = CONTENTS[width]
    assert (read.index, read.configs) == (family.index, family.configs)
    assert list(read.weights) == list(family.prefixes)


def test_the_configs_are_the_hubs():
    sd1, xl, refiner = (CONTENTS[width] for width in (SD1, XL, REFINER))
    assert sd1.index["_class_name"] == "StableDiffusionPipeline"
    assert sd1.configs["scheduler"]["_class_name"] == "PNDMScheduler"
    assert sd1.configs["scheduler"]["steps_offset"] == 1
    assert sd1.configs["scheduler"]["skip_prk_steps"] is True
    assert sd1.configs["vae"]["scaling_factor"] == 0.18215
    assert xl.index["force_zeros_for_empty_prompt"] is True
    assert xl.configs["scheduler"]["_class_name"] == "EulerDiscreteScheduler"
    assert xl.configs["scheduler"]["timestep_spacing"] == "leading"
    assert xl.configs["vae"]["scaling_factor"] == 0.13025
    assert refiner.index["requires_aesthetics_score"] is True
    assert refiner.index["text_encoder"] == [None, None]


@pytest.mark.parametrize("width", CONTENTS)
def test_our_networks_and_schedules_support_every_config(width):
    configs = dict(CONTENTS[width].configs)
    scheduler = configs.pop("scheduler")
    UNetConfig.from_json(configs.pop("unet"))
    AutoencoderKLConfig.from_json(configs.pop("vae"))
    for config in configs.values():
        CLIPTextConfig.from_json(config)
    noise_schedule(scheduler, OF_SCHEDULER[scheduler["_class_name"]])


def test_entries_that_are_not_weights_are_ignored(write):
    plain = single_file.read(write(shapes(SD1)))
    noisy = single_file.read(write(shapes(SD1) | NO_WEIGHTS))
    assert {n: w.keys() for n, w in noisy.weights.items()} == {
        n: w.keys() for n, w in plain.weights.items()
    }
    assert noisy.configs == plain.configs


@pytest.mark.parametrize("parameter", ["text_projection", "text_projection.weight"])
def test_only_clip_ls_projection_is_ignored(write, parameter):
    single_file.read(write(shapes(SD1) | {f"cond_stage_model.{parameter}": (2, 2)}))
    single_file.read(write(shapes(XL) | {f"conditioner.embedders.0.{parameter}": (2, 2)}))
    strange = f"conditioner.embedders.1.{parameter}"
    assert f"1 unknown ({strange})" in refusal(write(shapes(XL) | {strange: (2, 2)}))
    needed = "conditioner.embedders.1.model.text_projection"
    keys = {key: shape for key, shape in shapes(XL).items() if key != needed}
    assert f"1 missing ({needed})" in refusal(write(keys))


def test_two_keys_flag_v_prediction(write):
    marks = {"v_pred": (0,), "ztsnr": (0,)}
    scheduler = single_file.read(write(shapes(XL) | marks)).configs["scheduler"]
    assert scheduler == CONTENTS[XL].configs["scheduler"] | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }


@pytest.mark.parametrize(
    ("metadata", "config", "expected"),
    [
        ({}, None, "epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ({"ss_v_parameterization": "True"}, None, "v_prediction"),
        ({"ss_v_parameterization": "False"}, None, "epsilon"),
        ({"ss_v_parameterization": "None"}, None, "epsilon"),
        ({}, 'model: {params: {parameterization: "v"}}', "v_prediction"),
        ({}, "model: {params: {linear_start: 0.00085}}", "epsilon"),
        ({}, "- a list", "epsilon"),
        (
            {"modelspec.prediction_type": "v"},
            "model: {params: {parameterization: v}}",
            "v_prediction",
        ),
    ],
)
def test_what_is_predicted_is_read_from_metadata_and_from_the_yaml_beside(
    write, metadata, config, expected
):
    """The names of ModelSpec 1.0.1, of kohya's sd-scripts and of CompVis's configs."""
    path = write(shapes(SD1), **metadata)
    if config:
        path.with_suffix(".yaml").write_text(config)
    scheduler = single_file.read(path).configs["scheduler"]
    assert scheduler.get("prediction_type", "epsilon") == expected


# A list of two lists of two lists ..., whose text would have 2**40 items.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 41))


@pytest.mark.parametrize(
    ("metadata", "config", "message"),
    [
        (
            {"modelspec.prediction_type": "v", "ss_v_parameterization": "False"},
            None,
            "keep the one",
        ),
        ({"ss_v_parameterization": "True"}, "model: {params: {parameterization: eps}}", "keep the"),
        ({"modelspec.prediction_type": "rf"}, None, "= 'rf' is not supported"),
        ({}, "model: [", "cannot be read as YAML"),
        ({}, "[" * 5000, "cannot be read as YAML"),
        ({}, "a: b\n" * 10**5, "has more than 100000 bytes"),
        ({}, f"{BOMB}model: {{params: {{parameterization: *a40}}}}", "= 'list' is not supported"),
        ({}, "!!python/object/apply:os.system [true]", "cannot be read as YAML"),
    ],
)
def test_contradictions_and_broken_configs_are_rejected(write, metadata, config, message):
    path = write(shapes(SD1), **metadata)
    if config:
        path.with_suffix(".yaml").write_text(config)
    with pytest.raises(InputError, match=message):
        single_file.read(path)


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")], ids="dfl"
)
def test_a_yaml_beside_that_is_no_file_is_named(write, make):
    path = write(shapes(SD1))
    make(path.with_suffix(".yaml"))
    with pytest.raises(InputError, match=r"\.yaml "):
        single_file.read(path)


def test_early_files_without_text_model_in_their_keys_are_read(write):
    early = {key.replace("text_model.", ""): shape for key, shape in shapes(SD1).items()}
    read = single_file.read(write(early))
    tensor = read.weights["text_encoder"]["embeddings.token_embedding.weight"]
    assert tensor.key == "cond_stage_model.transformer.embeddings.token_embedding.weight"
    assert "contains its text encoder twice" in refusal(write(early | shapes(SD1)))


def test_layouts_are_converted_to_those_of_diffusers(tmp_path):
    """Tests fused queries, keys and values, a projection from the right, and 1x1 convolutions."""
    prefix = "conditioner.embedders.1.model."
    fused = f"{prefix}transformer.resblocks.7.attn.in_proj_weight"
    mixing = "first_stage_model.decoder.mid.attn_1.q.weight"
    special = {
        fused: np.arange(12, dtype=np.float32).reshape(6, 2),
        f"{prefix}text_projection": np.arange(6, dtype=np.float32).reshape(2, 3),
        mixing: np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1),
    }
    tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes(XL).items()} | special
    save_file(tensors, tmp_path / "xl.safetensors")
    weights = single_file.read(tmp_path / "xl.safetensors").weights
    text = weights["text_encoder_2"]
    for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
        tensor = text[f"encoder.layers.7.self_attn.{part}.weight"]
        np.testing.assert_array_equal(tensor.read(), special[fused][2 * i : 2 * i + 2])
    projection = text["text_projection.weight"]
    assert projection.shape == (3, 2)
    np.testing.assert_array_equal(projection.read(), special[f"{prefix}text_projection"].T)
    query = weights["vae"]["decoder.mid_block.attentions.0.to_q.weight"]
    np.testing.assert_array_equal(query.read(), special[mixing][:, :, 0, 0])


@pytest.mark.parametrize("width", CONTENTS)
def test_every_tensor_is_used_and_none_twice(write, width):
    weights = single_file.read(write(shapes(width))).weights.values()
    used = [tensor for network in weights for tensor in network.values()]
    assert {tensor.key for tensor in used} == shapes(width).keys()
    assert len({(tensor.key, tensor.offset) for tensor in used}) == len(used)


def test_missing_and_unknown_keys_are_counted_and_named_in_one_line(write):
    keys = shapes(SD1) | {f"{UNET}adapter.weight": (1,)}
    del keys[f"{UNET}out.2.bias"], keys["first_stage_model.quant_conv.bias"]
    message = refusal(write(keys))
    assert "Stable Diffusion 1" in message
    assert f"2 missing (first_stage_model.quant_conv.bias, {UNET}out.2.bias)" in message
    assert f"1 unknown ({UNET}adapter.weight)" in message


def test_a_distilled_model_with_fewer_layers_is_rejected(write):
    keys = {k: v for k, v in shapes(XL).items() if ".transformer_blocks.9." not in k}
    assert "missing" in refusal(write(keys))


def test_a_missing_autoencoder_is_reported(write):
    keys = {k: v for k, v in shapes(SD1).items() if not k.startswith("first_stage_model.")}
    assert "has no vae (no key begins with first_stage_model.)" in refusal(write(keys))


def test_the_error_for_stable_diffusion_2_tells_to_convert_it(write):
    keys = {key: (1, 1024) if shape == (1, SD1) else shape for key, shape in shapes(SD1).items()}
    message = refusal(write(keys))
    assert "Stable Diffusion 2" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(("channels", "task"), [(9, "inpainting"), (8, "image editing")])
@pytest.mark.parametrize("width", [SD1, XL])
def test_a_model_for_another_task_is_named(write, channels, task, width):
    assert task in refusal(write(shapes(width) | {CONV_IN: (2, channels, 1, 1)}))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "Diffusion 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("control_model.time_embed.0.weight", "ControlNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "LoRA"),
        ("edm_mean", "EDM"),
        ("down_blocks.0.resnets.0.conv1.weight", "a single network"),
        ("encoder.down.0.block.0.conv1.weight", "a single network"),
        ("model.layers.0.mlp.weight", "not a Stable Diffusion model"),
    ],
)
def test_other_kinds_of_files_are_named(write, key, what):
    assert what in refusal(write({key: (2, 2)}))


def test_weights_that_are_not_floats_are_refused(write):
    assert "I8" in refusal(write(shapes(SD1), np.int8))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("first_stage_model.encoder.mid.attn_1.q.weight", (2, 2, 3, 3)),
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", ()),
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", (4, 2)),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named(write, key, shape):
    message = refusal(write(shapes(XL) | {key: shape}))
    assert f"{key} has the wrong shape {list(shape)}" in message


def test_a_truncated_file_is_refused(write):
    path = write(shapes(SD1))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert "copy it again" in refusal(path)
    header = json.dumps({"a": 1}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "broken safetensors header" in refusal(path)
