"""In single files, diffusers' converters find the same weights under the same names."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.checkpoint import single_file
from jaxdiff.checkpoint.original import ldm
from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.checkpoint.tensors import StoredTensor

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.loaders import single_file_utils as theirs  # noqa: E402

TOKENIZER = Path(__file__).parents[2] / "jaxdiff" / "assets" / "shapes64" / "tokenizer"
# Sizes that make a family small enough to draw its weights, but keep its structure.
TINY_CLIP = {
    "vocab_size": 641,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "projection_dim": 32,
}
TINY = {
    "text_encoder": TINY_CLIP,
    "text_encoder_2": TINY_CLIP | {"hidden_size": 48, "projection_dim": 48},
    "unet": {"cross_attention_dim": 32, "norm_num_groups": 8, "attention_head_dim": 4},
    "vae": {"block_out_channels": [8, 16, 24, 24], "norm_num_groups": 8},
    "scheduler": {},
}


def tiny(family):
    """Returns the family with the same blocks but few channels; every width is different."""
    configs = {key: config | TINY[key] for key, config in family.configs.items()}
    blocks = len(configs["unet"]["down_block_types"])
    configs["unet"]["block_out_channels"] = [16, 32, 48, 48][:blocks]
    if "transformer_layers_per_block" in configs["unet"]:
        configs["unet"]["projection_class_embeddings_input_dim"] = 6 * 256 + 48
    return dataclasses.replace(family, configs=configs)


def reference(config):
    """Builds diffusers' or transformers' network for a config, without weights."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        model_class = getattr(transformers, config["architectures"][0])
        return model_class(transformers.CLIPTextConfig.from_dict(config))


def shapes(network):
    return {
        key.removeprefix("text_model."): tuple(value.shape)
        for key, value in network.state_dict().items()
    }


def original_shapes(family):
    """Returns the shape of each tensor in a single file of the family."""
    found = {}
    for network, prefix in family.prefixes.items():
        wanted = shapes(reference(family.configs[network]))
        for ours, key, _ in ldm.names(family.configs[network]):
            shape = wanted[ours]
            if ".in_proj_" in key:
                shape = (3 * shape[0], *shape[1:])
            elif ".attn_1." in key and key.endswith("weight") and ".norm." not in key:
                shape = (*shape, 1, 1)
            elif key == "text_projection":
                shape = shape[::-1]
            found[prefix + key] = shape
    return found


def converted(tensors, family):
    """Converts a single file's tensors with diffusers; returns them by network and key."""
    found = {}
    for network, prefix in family.prefixes.items():
        config = family.configs[network]
        if network == "unet":
            weights = theirs.convert_ldm_unet_checkpoint(tensors, config)
        elif network == "vae":
            weights = theirs.convert_ldm_vae_checkpoint(tensors, config)
        elif network == "text_encoder":
            weights = theirs.convert_ldm_clip_checkpoint(tensors)
        else:
            weights = theirs.convert_open_clip_checkpoint(reference(config), tensors, prefix)
        found[network] = {key.removeprefix("text_model."): value for key, value in weights.items()}
    return found


# The tensors of v1-5-pruned-emaonly and sd_xl_base_1.0, without position_ids and logit_scale.
COUNTS = {768: 1131 - 1, 2048: 2515 - 2}


@pytest.mark.parametrize("width", CONTENTS, ids=["1", "xl", "refiner"])
def test_at_full_size_the_keys_and_shapes_match_diffusers(width):
    family = CONTENTS[width]
    originals = original_shapes(family)
    assert len(originals) == COUNTS.get(width, len(originals))
    wanted = {network: shapes(reference(family.configs[network])) for network in family.prefixes}
    stored = {
        key: StoredTensor(Path("a.safetensors"), key, "F16", shape, 0)
        for key, shape in originals.items()
    }
    ours = single_file.weights(Path("a.safetensors"), stored, family)
    assert {n: {k: t.shape for k, t in found.items()} for n, found in ours.items()} == wanted
    meta = {key: torch.empty(shape, device="meta") for key, shape in originals.items()}
    found = converted(meta, family)
    assert {n: {k: tuple(t.shape) for k, t in w.items()} for n, w in found.items()} == wanted


@pytest.fixture(scope="module", params=CONTENTS, ids=["1", "xl", "refiner"])
def tiny_file(request, tmp_path_factory):
    """Returns a family with few channels, and a single file of it with random weights."""
    family = tiny(CONTENTS[request.param])
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    tensors = {
        key: generator.standard_normal(shape, np.float32)
        for key, shape in original_shapes(family).items()
    }
    save_file(tensors, path)
    return family, path


def test_every_value_ends_up_where_diffusers_puts_it(tiny_file):
    family, path = tiny_file
    ours = single_file.weights(path, read_header(path), family)
    found = converted(theirs.load_single_file_checkpoint(str(path)), family)
    assert {n: w.keys() for n, w in ours.items()} == {n: w.keys() for n, w in found.items()}
    for network, weights in ours.items():
        for key, tensor in weights.items():
            np.testing.assert_array_equal(tensor.read(), found[network][key], err_msg=key)


def test_diffusers_pipeline_has_the_same_weights(tiny_file, tmp_path):
    family, path = tiny_file
    for component, config in family.configs.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (tmp_path / component).mkdir()
        (tmp_path / component / name).write_text(json.dumps(config))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TOKENIZER, tmp_path / name)
    (tmp_path / "model_index.json").write_text(json.dumps(family.index))
    pipeline_class = getattr(diffusers, family.index["_class_name"])
    pipeline = pipeline_class.from_single_file(str(path), config=str(tmp_path))
    for network, weights in single_file.weights(path, read_header(path), family).items():
        state = getattr(pipeline, network).state_dict()
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
        assert state.keys() == weights.keys()
        for key, tensor in weights.items():
            np.testing.assert_array_equal(tensor.read(), state[key].numpy(), err_msg=key)
    scheduler = family.configs["scheduler"]
    assert type(pipeline.scheduler).__name__ == scheduler["_class_name"]
    assert pipeline.scheduler.config["steps_offset"] == 1
