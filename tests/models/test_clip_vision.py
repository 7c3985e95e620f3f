"""Compares CLIP's image encoder with its paper's formulas, written in NumPy."""

import clips
import numpy as np
import pytest
from scipy.special import erf, expit, softmax

from jaxdiff.models.text.clip import CLIPConfig, CLIPVisionConfig

pytestmark = pytest.mark.usefixtures("compiled_faster")
ACTIVATIONS = {
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
}


def formula(weights: dict, config: CLIPVisionConfig, image: np.ndarray) -> np.ndarray:
    """Returns the vector of an image [h, w, 3], in float64."""
    w = {key.removeprefix("vision_model."): np.float64(value) for key, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(centred.var(-1, keepdims=True) + config.layer_norm_eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    side, kernel = config.patch_size, w["embeddings.patch_embedding.weight"]  # [out, in, h, w]
    starts = range(0, config.image_size - side + 1, side)
    patches = [image[y : y + side, x : x + side] for y in starts for x in starts]
    tokens = [np.einsum("hwi,oihw->o", patch, kernel) for patch in patches]
    x = np.stack([w["embeddings.class_embedding"], *tokens])
    x = norm(x + w["embeddings.position_embedding.weight"], "pre_layrnorm")
    for i in range(config.num_hidden_layers):
        layer, heads = f"encoder.layers.{i}", config.num_attention_heads
        normed = norm(x, f"{layer}.layer_norm1")
        query, key, value = (
            np.split(linear(normed, f"{layer}.self_attn.{part}_proj"), heads, axis=1)
            for part in "qkv"
        )
        mixed = [
            softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v
            for q, k, v in zip(query, key, value, strict=True)
        ]
        x = x + linear(np.concatenate(mixed, axis=1), f"{layer}.self_attn.out_proj")
        wide = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(ACTIVATIONS[config.hidden_act](wide), f"{layer}.mlp.fc2")
    return linear(norm(x[0], "post_layernorm"), "visual_projection")


@pytest.mark.parametrize("name", ["OPENAI", "OPEN_CLIP"])
def test_image_vectors_match_the_formulas(name):
    config: CLIPConfig = getattr(clips, name)
    weights, network = clips.weights(config), clips.network(config)
    size = config.vision.image_size
    images = np.random.default_rng(0).standard_normal((3, size, size, 3)).astype(np.float32)
    found = network(images)
    for image, vector in zip(images, found, strict=True):
        expected = formula(weights, config.vision, image)
        assert np.linalg.norm(vector - expected) <= 1e-5 * np.linalg.norm(expected)


def test_neighbours_do_not_change_an_image():
    network = clips.network(clips.OPENAI)
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    others = images.copy()
    others[1:] = images[[3, 1, 2]] * 5
    np.testing.assert_array_equal(network(images)[0], network(others)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"num_attention_heads": 7}, "cannot be split into heads"),
        ({"num_channels": 1}, "num_channels = 1 is not supported"),
        ({"patch_size": 300}, "patch_size = 300 is larger than the image"),
    ],
)
def test_unsupported_configs_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig(**fields)
