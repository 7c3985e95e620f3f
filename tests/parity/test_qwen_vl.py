"""Qwen2.5-VL gives the hidden states of transformers for prompts with images."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.families import qwen_image
from jaxdiff.families.components import QWEN_2_5_VL, QWEN_2_5_VL_WITH_VISION
from jaxdiff.images.clip_pixels import MEAN, STD
from jaxdiff.models.text import qwen_vision, qwen_vl
from jaxdiff.models.text.qwen_vl import Qwen2_5_VLImageConfig, Qwen2_5_VLModel
from jaxdiff.weights.load import file_shapes, load_params, name_of, places
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import networks  # noqa: E402
from PIL import Image  # noqa: E402
from published_encoders import QWEN_IMAGE_EDIT  # noqa: E402  (beside this file)
from test_text_encoders import DECODER, MROPE  # noqa: E402
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

IMAGE, SIZES = 253, [(84, 140), (56, 56), (112, 168)]  # sides not of whole windows, and of whole
CONFIG = {
    "text_config": DECODER | {"num_hidden_layers": 2, "rope_parameters": MROPE},
    "vision_config": {
        "depth": 3,
        "fullatt_block_indexes": [1],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 56,
    },
    "image_token_id": IMAGE,
    "video_token_id": 254,
}


@pytest.fixture(scope="module")
def reference():
    """transformers' network with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(**CONFIG)
    network = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in network.parameters():  # no norm stays one and no bias zero
            weight.add_(0.1 * torch.randn_like(weight))
    return network


def weights_of(reference, component=QWEN_2_5_VL_WITH_VISION) -> dict:
    """The weights by our keys, as the component reads them from a file."""
    keys = {key: component.plain_key(key.removeprefix("model.")) for key in reference.state_dict()}
    return {keys[key]: value for key, value in reference.state_dict().items() if keys[key]}


@pytest.fixture(scope="module")
def ours(reference, tmp_path_factory):
    """Returns a function that calls a method of our network with the same weights."""
    folder = tmp_path_factory.mktemp("encoder")
    reference.config.save_pretrained(folder)
    config = Qwen2_5_VLImageConfig.from_json(json.loads((folder / "config.json").read_text()))
    graph, shapes = abstract_network(Qwen2_5_VLModel, config)
    tensors = {
        key: SimpleNamespace(shape=tuple(value.shape), read=value.numpy)
        for key, value in weights_of(reference).items()
    }
    params = load_params(places(shapes, np.float32), tensors)

    def ours(call, *inputs, dtype=np.float32):
        given = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return compilation.jit(lambda params, inputs: call(nnx.merge(graph, params), *inputs))(
            given, inputs
        )

    return ours


def pictures(height: int, width: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width, 3), np.uint8)


def normalised(images: np.ndarray) -> np.ndarray:
    return ((images / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def processed(images: np.ndarray) -> dict:
    """What transformers makes of images: patches, and the size of each in patches."""
    processor = processing.Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 1e9})
    return processor([Image.fromarray(image) for image in images], return_tensors="pt")


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of two prompts with an image at different places, and the mask of their tokens."""
    token_ids = np.random.RandomState(0).randint(1, 250, (2, 12)).astype(np.int32)
    token_ids[0, 3] = token_ids[1, 5] = IMAGE
    return token_ids, np.arange(12) < np.array([[12], [9]])


def encoded(network, *inputs):
    return network.with_images(*inputs, layers=(1, -1))


@torch.no_grad()
def their_states(reference, token_ids: np.ndarray, images: np.ndarray) -> list[np.ndarray]:
    """The hidden states of one prompt, in which transformers repeats the image's token."""
    found = processed(images)
    count = int(found["image_grid_thw"].prod()) // 4
    ids = torch.tensor(
        [n for token in token_ids for n in [token] * (count if token == IMAGE else 1)]
    )
    is_image = (ids == IMAGE).int()
    output = reference(
        input_ids=ids[None], mm_token_type_ids=is_image[None], output_hidden_states=True, **found
    )
    return [output.hidden_states[layer][0].numpy() for layer in (1, -1)]


@pytest.mark.parametrize("size", SIZES)
def test_the_vision_tower(reference, ours, size):
    images = pictures(*size)
    found = processed(images)
    with torch.no_grad():
        theirs = reference.model.visual(found["pixel_values"], found["image_grid_thw"])
    theirs = theirs.pooler_output.reshape(2, -1, 32).numpy()
    difference = networks.difference(
        ours(lambda network, x: network.visual(x), normalised(images)), theirs
    )
    assert difference <= networks.BOUND


@pytest.mark.parametrize("size", SIZES[:2])
def test_prompts_with_images(reference, ours, size):
    token_ids, mask = prompts()
    images = pictures(*size)
    states, seen = ours(encoded, token_ids, mask, normalised(images))
    for row in range(2):
        theirs = their_states(reference, token_ids[row][mask[row]], images[row : row + 1])
        for found, expected in zip(states, theirs, strict=True):
            assert seen[row].sum() == len(expected)
            difference = networks.difference(found[row][seen[row]], expected)
            assert difference <= networks.BOUND


def test_a_prompts_states_depend_on_its_own_image_only(ours):
    token_ids, mask = prompts()
    images = pictures(84, 140, 3)
    (_, states), _ = ours(encoded, token_ids, mask, normalised(images[:2]))
    (_, others), _ = ours(encoded, token_ids, mask, normalised(images[[0, 2]]))
    np.testing.assert_array_equal(states[0], others[0])
    assert networks.difference(others[1], np.asarray(states[1])) > 0.01


def test_bfloat16(ours):
    inputs = *prompts(), normalised(pictures(56, 56))
    (_, exact), _ = ours(encoded, *inputs)
    (_, half), _ = ours(encoded, *inputs, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert networks.difference(half.astype(np.float32), np.asarray(exact)) < 0.03


def test_the_hubs_config_gives_the_keys_and_shapes_of_transformers():
    config = Qwen2_5_VLImageConfig.from_json(QWEN_IMAGE_EDIT)
    assert Qwen2_5_VLImageConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig.from_dict(QWEN_IMAGE_EDIT)
        )
    expected = {key: tuple(value.shape) for key, value in weights_of(theirs).items()}
    _, shapes = abstract_network(Qwen2_5_VLModel, config)
    assert file_shapes(shapes) == expected
    assert len(expected) == 728
    assert not any("visual" in key for key in weights_of(theirs, QWEN_2_5_VL))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = name_of(path)
        rules = [axis for pattern, axis in qwen_vl.SHARDING if re.search(pattern, name)]
        is_split = len(leaf.shape) > 1 and "patch_embed" not in name
        is_last = re.search(r"(o_proj|down_proj|attn\.proj|mlp\.2)\.kernel$", name)
        assert rules == ([-2] if is_last else [-1] if is_split else []), name


@pytest.mark.parametrize("size", [(1024, 1024), (16, 1024), (32, 32), (4096, 4096), (832, 1248)])
def test_images_are_seen_in_the_size_of_the_published_processor(size):
    most, least = qwen_image.MOST_SEEN_PX, qwen_image.LEAST_SEEN_PX
    assert (most, least, qwen_image.SEEN_FACTOR) == (12845056, 3136, qwen_vision.FACTOR)
    expected = processing.smart_resize(*size, min_pixels=least, max_pixels=most)
    assert qwen_image.seen_size(*size) == expected


VISION = QWEN_IMAGE_EDIT["vision_config"]
REFUSED = [
    ({"vision_config": None}, "vision_config = None is not supported"),
    ({"vision_config": VISION | {"patch_size": 16}}, "patch_size = 16 is not supported"),
    ({"vision_config": VISION | {"num_heads": 3}}, "hidden_size = 1280 is not a multiple of 4"),
    ({"vision_config": VISION | {"window_size": 14}}, "window_size = 14 is less than 28 pixels"),
    ({"vision_config": VISION | {"out_hidden_size": 32}}, "out_hidden_size = 32 of vision_config"),
    ({"vision_config": VISION | {"deepstack": [1]}}, "the key deepstack = "),
    ({"image_token_id": 152064}, "image_token_id = 152064 is no token"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_configs_are_refused_in_a_line(change, message):
    with pytest.raises(InputError, match=f"^text_encoder/config.json: .*{message}") as refusal:
        Qwen2_5_VLImageConfig.from_json(QWEN_IMAGE_EDIT | change)
    assert "\n" not in str(refusal.value)
