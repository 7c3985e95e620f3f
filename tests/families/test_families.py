"""Which pipelines are supported, and whether their defaults match diffusers' pipelines."""

import json
import shutil
from pathlib import Path

import pytest

from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.stable_diffusion import kohya_names


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may modify; these tests build no networks."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "stable-diffusion-xl"))


@pytest.fixture
def xl(checkpoint) -> Path:
    shutil.copytree(checkpoint / "text_encoder", checkpoint / "text_encoder_2")
    shutil.copytree(checkpoint / "tokenizer", checkpoint / "tokenizer_2")
    edit_json(
        checkpoint / "model_index.json",
        _class_name="StableDiffusionXLPipeline",
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],  # missing but not needed
        feature_extractor=["transformers", "CLIPImageProcessor"],
        force_zeros_for_empty_prompt=True,
    )
    return checkpoint


@pytest.fixture
def refiner(xl) -> Path:
    shutil.rmtree(xl / "text_encoder")
    shutil.rmtree(xl / "tokenizer")
    edit_json(
        xl / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
    )
    return xl


def test_stable_diffusion_1_and_2_differ_in_their_projections(checkpoint):
    assert open_checkpoint(checkpoint).defaults.name == "Stable Diffusion 1"
    edit_json(checkpoint / "unet" / "config.json", use_linear_projection=True)
    opened = open_checkpoint(checkpoint)
    assert opened.defaults.name == "Stable Diffusion 2"
    assert opened.networks == ("text_encoder", "unet", "vae")
    assert opened.text_encoders == ("text_encoder",)
    assert (opened.defaults.steps, opened.defaults.guidance_scale) == (50, 7.5)


def test_xl_has_two_text_encoders_with_a_tokenizer_each(xl):
    opened = open_checkpoint(xl)
    assert opened.defaults.name == "Stable Diffusion XL"
    assert opened.pipeline == "StableDiffusionXLPipeline"
    assert opened.networks == ("text_encoder", "text_encoder_2", "unet", "vae")
    assert opened.text_encoders == ("text_encoder", "text_encoder_2")
    assert opened.tokenizer("text_encoder") == xl / "tokenizer"
    assert opened.tokenizer("text_encoder_2") == xl / "tokenizer_2"
    assert "final_layer_norm.bias" in opened.weights("text_encoder_2")
    assert opened.index["force_zeros_for_empty_prompt"]
    assert (opened.defaults.steps, opened.defaults.guidance_scale) == (50, 5.0)
    before = opened.fingerprint
    (xl / "tokenizer_2" / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    assert open_checkpoint(xl).fingerprint != before


def test_xls_refiner_has_only_the_second_text_encoder(refiner):
    opened = open_checkpoint(refiner)
    assert opened.defaults.name == "Stable Diffusion XL refiner"
    assert opened.networks == ("text_encoder_2", "unet", "vae")
    assert opened.text_encoders == ("text_encoder_2",)
    assert opened.index["requires_aesthetics_score"]


def test_kohyas_names_need_a_config_that_describes_a_unet(xl):
    edit_json(xl / "unet" / "config.json", layers_per_block=10**9)
    opened = open_checkpoint(xl)
    assert len(kohya_names(opened, "unet")) == len(opened.weights("unet"))  # not a billion
    edit_json(xl / "unet" / "config.json", block_out_channels=None)
    with pytest.raises(InputError, match=r"unet/config\.json does not describe a U-Net"):
        kohya_names(open_checkpoint(xl), "unet")


def test_a_latent_consistency_model_takes_four_steps(checkpoint):
    edit_json(checkpoint / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    edit_json(checkpoint / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    opened = open_checkpoint(checkpoint)
    assert opened.defaults.name == "Stable Diffusion 1"
    assert (opened.defaults.steps, opened.defaults.guidance_scale) == (4, 8.5)
    assert opened.defaults.sampler == "lcm"


def test_the_bundled_models_own_defaults_do_not_depend_on_a_name(checkpoint):
    bundled = open_checkpoint("shapes64")
    assert (bundled.defaults.steps, bundled.defaults.guidance_scale) == (20, 1.5)
    assert bundled.path == BUNDLED["shapes64"]
    namesake = open_checkpoint(checkpoint.rename(checkpoint.with_name("shapes64")))
    assert (namesake.defaults.steps, namesake.defaults.guidance_scale) == (50, 7.5)


@pytest.mark.parametrize(
    "pipeline",
    ["KolorsPipeline", "StableDiffusionGLIGENPipeline", None, ["pipeline", "Custom"], {}],
)
def test_unsupported_pipelines_are_named(checkpoint, pipeline):
    edit_json(checkpoint / "model_index.json", _class_name=pipeline)
    with pytest.raises(InputError, match=r"model_index\.json: .* is not supported") as caught:
        open_checkpoint(checkpoint)
    assert str(pipeline) in str(caught.value)


@pytest.mark.parametrize("network", ["text_encoder_2", "unet", "vae"])
def test_a_network_that_is_not_listed_is_named(xl, network):
    edit_json(xl / "model_index.json", **{network: [None, None]})
    with pytest.raises(InputError, match=rf"model_index\.json: {network} is \[None, None\]"):
        open_checkpoint(xl)


def test_an_inpainting_tokenizer_or_network_that_is_missing_is_named(xl):
    shutil.rmtree(xl / "tokenizer_2")
    with pytest.raises(InputError, match=r"tokenizer_2 lacks tokenizer\.json"):
        open_checkpoint(xl)
    shutil.rmtree(xl / "text_encoder_2")
    with pytest.raises(InputError, match=r"text_encoder_2/model\.safetensors is missing"):
        open_checkpoint(xl)


SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
}


def test_each_scheduler_names_its_sampler(checkpoint):
    path = checkpoint / "scheduler" / "scheduler_config.json"
    for scheduler, sampler in SAMPLERS.items():
        edit_json(path, _class_name=scheduler)
        assert open_checkpoint(checkpoint).defaults.sampler == sampler
    edit_json(path, _class_name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    assert open_checkpoint(checkpoint).defaults.sampler == "dpmpp_2m_sde"


@pytest.mark.parametrize(
    "scheduler",
    ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchHeunDiscreteScheduler"],
)
def test_other_noise_levels_are_rejected_with_every_sampler(xl, scheduler):
    edit_json(xl / "scheduler" / "scheduler_config.json", _class_name=scheduler)
    with pytest.raises(InputError, match=rf"scheduler_config\.json: {scheduler} has noise levels"):
        open_checkpoint(xl)


def scheduler_of(directory: Path, config: dict) -> dict:
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return open_checkpoint(directory).defaults.scheduler


def test_stable_diffusions_pipeline_corrects_early_scheduler_files(checkpoint):
    early = {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True}
    right = {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False}
    assert scheduler_of(checkpoint, early) == right
    assert scheduler_of(checkpoint, right) == right


def test_a_missing_value_is_corrected_only_for_the_files_own_scheduler(checkpoint):
    silent = scheduler_of(checkpoint, {"_class_name": "DDIMScheduler"})
    assert (silent["steps_offset"], silent["clip_sample"]) == (1, False)
    assert silent["_use_default_values"] == ["steps_offset", "clip_sample"]
    euler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    left_out = {"steps_offset": 1, "_use_default_values": ["steps_offset"]}
    assert scheduler_of(checkpoint, euler) == euler | left_out


def test_the_other_pipelines_leave_the_scheduler_unchanged(xl):
    early = {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True}
    assert scheduler_of(xl, early) == early


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"sample_size": 96}, (768, 768)),
        ({"sample_size": [64, 96]}, (768, 512)),  # height, width
        ({"sample_size": 32, "_diffusers_version": "0.6.0"}, (512, 512)),  # as in diffusers
        ({"sample_size": 32, "_diffusers_version": "0.9.0"}, (256, 256)),
        ({"sample_size": 32, "_diffusers_version": "0.42.1"}, (256, 256)),
    ],
)
def test_the_default_size_is_that_of_the_pipeline(checkpoint, changes, size):
    edit_json(checkpoint / "unet" / "config.json", **changes)
    assert open_checkpoint(checkpoint).defaults.size == size
