"""With the same random weights, the text encoders give the hidden states of transformers."""

import copy
import json
import re
from dataclasses import fields
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.models.text import gemma2, qwen, t5
from jaxdiff.models.text.gemma2 import Gemma2Config, Gemma2Model
from jaxdiff.models.text.qwen import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3Model,
)
from jaxdiff.models.text.t5 import T5Config, T5EncoderModel
from jaxdiff.weights.load import file_shapes, load_params, name_of, places
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import networks  # noqa: E402
from published_encoders import (  # noqa: E402  (beside this file)
    GEMMA2_2B,
    QWEN2_5_VL_7B,
    QWEN3_4B,
    QWEN3_8B,
    QWEN_IMAGE,
    T5_XXL,
    T5_XXL_FLUX,
    UMT5_XXL,
)

pytestmark = pytest.mark.usefixtures("compiled_faster")

T5 = {
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
DECODER = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3 = DECODER | {"head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}
# A cap of 1 bends these weights' scores; one of 50 would not.
GEMMA2 = DECODER | {"head_dim": 8, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 1.0}


def make_t5():
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def make_umt5():
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))


def make_qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3))


def make_qwen2_5_vl():
    text = DECODER | {"rope_parameters": MROPE}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def make_gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GEMMA2))


ENCODERS = {
    "T5": (make_t5, T5Config, T5EncoderModel),
    "UMT5": (make_umt5, T5Config, T5EncoderModel),
    "Qwen3": (make_qwen3, Qwen3Config, Qwen3Model),
    "Qwen2.5-VL": (make_qwen2_5_vl, Qwen2_5_VLConfig, Qwen2_5_VLTextModel),
    "Gemma 2": (make_gemma2, Gemma2Config, Gemma2Model),
}
T5S, DECODERS = ("T5", "UMT5"), ("Qwen3", "Qwen2.5-VL", "Gemma 2")


def text_weights(weights: dict) -> dict:
    """The text encoder's weights under our keys: without prefixes, heads and images."""
    kept = {}
    for key, value in weights.items():
        key = key.removeprefix("model.").removeprefix("language_model.")
        if not key.startswith(("lm_head.", "visual.", "encoder.embed_tokens.")):
            kept[key] = value
    return kept


class Pair:
    """One of transformers' networks with random weights, and ours with the same."""

    def __init__(self, name: str, folder):
        make, config_class, network_class = ENCODERS[name]
        torch.manual_seed(0)
        self.reference = make().eval()
        with torch.no_grad():
            for weight in self.reference.parameters():  # no norm stays one and no bias zero
                weight.add_(0.1 * torch.randn_like(weight))
        self.reference.config.save_pretrained(folder)
        self.config = config_class.from_json(json.loads((folder / "config.json").read_text()))
        self.graph, shapes = abstract_network(network_class, self.config)
        weights = text_weights(self.reference.state_dict())
        tensors = {
            key: SimpleNamespace(shape=tuple(value.shape), read=value.numpy)
            for key, value in weights.items()
        }
        self.params = load_params(places(shapes, np.float32), tensors)

    def ours(self, *inputs, dtype=np.float32, **options):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), self.params)
        return compilation.jit(lambda p, i: nnx.merge(self.graph, p)(*i, **options))(params, inputs)

    def theirs(self, token_ids, mask=None):
        """Returns all hidden states; T5's last one is after its norm."""
        with torch.no_grad():
            output = self.reference(
                input_ids=torch.tensor(token_ids),
                attention_mask=None if mask is None else torch.tensor(mask).long(),
                output_hidden_states=True,
            )
        return [state.numpy() for state in output.hidden_states]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def pair(name: str) -> Pair:
        if name not in made:
            made[name] = Pair(name, tmp_path_factory.mktemp("encoder"))
        return made[name]

    return pair


def prompts(tokens: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of three prompts and the mask of their tokens; the first one has no padding."""
    token_ids = np.random.RandomState(seed).randint(1, 250, (3, tokens)).astype(np.int32)
    mask = np.arange(tokens) < np.array([tokens, tokens // 2, 1])[:, None]
    return np.where(mask, token_ids, 0), mask


@pytest.mark.parametrize("name", T5S)
@pytest.mark.parametrize("masked", [True, False])
def test_t5(pair, name, masked):
    token_ids, mask = prompts(160)  # distances in every bucket
    mask = mask if masked else None
    ours, theirs = pair(name).ours(token_ids, mask), pair(name).theirs(token_ids, mask)[-1]
    assert networks.difference(ours, theirs) <= networks.BOUND


def test_every_distance_has_transformers_bucket():
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distances = torch.arange(700)[None] - torch.arange(700)[:, None]
    for buckets, most in ((32, 128), (16, 50)):
        expected = theirs(distances, num_buckets=buckets, max_distance=most).numpy()
        np.testing.assert_array_equal(t5.relative_buckets(700, buckets, most), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(pair, name):
    token_ids, mask = prompts()
    layers = (0, 1, 2, 3, -1, -2, -4)
    theirs = pair(name).theirs(token_ids, mask)
    # Qwen2.5-VL counts the positions of padding differently, which no prompt's token sees.
    seen = mask if name == "Qwen2.5-VL" else np.ones_like(mask)
    for layer, ours in zip(layers, pair(name).ours(token_ids, mask, layers=layers), strict=True):
        difference = networks.difference(ours[seen], theirs[layer][seen])
        assert difference <= networks.BOUND, layer


@pytest.mark.parametrize("name", DECODERS)
def test_layers_after_the_last_wanted_one_are_not_computed(pair, name):
    token_ids, mask = prompts()
    network = nnx.merge(pair(name).graph, pair(name).params)

    def products(*layers: int) -> int:
        program = jax.make_jaxpr(lambda ids: network(ids, mask, layers=layers))(token_ids)
        return str(program).count("dot_general")

    each = products(1)
    assert each == 9
    assert [products(0), products(2, 0), products(-2), products(-1)] == [
        0,
        *2 * [2 * each],
        3 * each,
    ]
    with pytest.raises(ValueError, match="layer 4 is not one of the 4 hidden states"):
        products(4)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_prompts_states_do_not_depend_on_its_neighbours(pair, name):
    token_ids, mask = prompts()
    others, _ = prompts(seed=1)
    others[0], longer = token_ids[0], np.ones_like(mask)
    options = {} if name in T5S else {"layers": (1, -1)}
    alone, among = (
        pair(name).ours(ids, seen, **options) for ids, seen in ((token_ids, mask), (others, longer))
    )
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(among), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert not np.array_equal(one[1], other[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16(pair, name):
    token_ids, mask = prompts()
    options = {} if name in T5S else {"layers": (0, -1)}
    full = jax.tree.leaves(pair(name).ours(token_ids, mask, **options))
    half = jax.tree.leaves(pair(name).ours(token_ids, mask, dtype=jnp.bfloat16, **options))
    for expected, found in zip(full, half, strict=True):
        assert found.dtype == jnp.bfloat16
        assert networks.difference(found.astype(np.float32), np.asarray(expected)) < 0.02


def test_gemma_2_refuses_more_tokens_than_its_window(pair):
    ids = np.ones((1, 4097), np.int32)
    with pytest.raises(ValueError, match="4097 tokens are more than the window of 4096"):
        pair("Gemma 2").ours(ids, ids > 0, layers=(0,))


FULL_SIZE = {  # the file, transformers' classes and the number of weights
    "T5-XXL": (T5_XXL, "T5Config", "T5EncoderModel", 219),
    "Flux's T5-XXL": (T5_XXL_FLUX, "T5Config", "T5EncoderModel", 219),
    "UMT5-XXL": (UMT5_XXL, "UMT5Config", "UMT5EncoderModel", 242),
    "Qwen3-4B": (QWEN3_4B, "Qwen3Config", "Qwen3Model", 398),
    "Qwen3-8B": (QWEN3_8B, "Qwen3Config", "Qwen3Model", 398),
    "Qwen2.5-VL-7B": (QWEN2_5_VL_7B, "Qwen2_5_VLConfig", "Qwen2_5_VLModel", 338),
    "Qwen-Image": (QWEN_IMAGE, "Qwen2_5_VLConfig", "Qwen2_5_VLModel", 338),
    "Gemma-2-2B": (GEMMA2_2B, "Gemma2Config", "Gemma2Model", 288),
}
OURS = {
    "t5": (T5Config, T5EncoderModel, t5.SHARDING),
    "umt5": (T5Config, T5EncoderModel, t5.SHARDING),
    "qwen3": (Qwen3Config, Qwen3Model, qwen.SHARDING),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLTextModel, qwen.SHARDING),
    "gemma2": (Gemma2Config, Gemma2Model, gemma2.SHARDING),
}


def read(data: dict):
    return OURS[data["model_type"]][0].from_json(data)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_hubs_configs_give_the_keys_and_shapes_of_transformers(name):
    data, config_class, network_class, count = FULL_SIZE[name]
    shapes = abstract_network(OURS[data["model_type"]][1], read(data))[1]
    with torch.device("meta"):
        config = getattr(transformers, config_class).from_dict(data)
        weights = getattr(transformers, network_class)(config).state_dict()
    theirs = {key: tuple(value.shape) for key, value in text_weights(weights).items()}
    assert file_shapes(shapes) == theirs
    assert len(theirs) == count


@pytest.mark.parametrize("model_type", OURS)
def test_every_matrix_is_split_by_a_rule(model_type):
    config_class, network_class, rules = OURS[model_type]
    small = {"num_layers" if config_class is T5Config else "num_hidden_layers": 2}
    data = next(data for data, *_ in FULL_SIZE.values() if data["model_type"] == model_type)
    shapes = abstract_network(network_class, read(data | small))[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = name_of(path)
        axes = [axis for pattern, axis in rules if re.search(pattern, name)]
        is_last = re.search(r"\.(o|wo|o_proj|down_proj)\.kernel$", name)
        assert axes == ([] if len(leaf.shape) == 1 else [-2] if is_last else [-1]), name


@pytest.mark.parametrize("name", FULL_SIZE)
def test_configs_survive_writing_and_transformers_reads_them_alike(name):
    data, config_class, *_ = FULL_SIZE[name]
    written = json.loads(json.dumps(read(data).to_json()))
    assert read(written) == read(data)
    first, second = (
        getattr(transformers, config_class).from_dict(each).get_text_config()
        for each in (data, written)
    )
    for field in fields(read(data)):
        if field.name in ("mrope_section", "rope_theta"):
            assert first.rope_parameters[field.name] == second.rope_parameters[field.name]
        elif field.name != "model_type":
            assert getattr(first, field.name) == getattr(second, field.name)


@pytest.mark.parametrize(
    ("rotation", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "default", "rope_theta": 5e5}}, 5e5),
        ({}, 1e4),
    ],
)
def test_the_rotations_base_is_found_where_transformers_finds_it(rotation, theta):
    data = {"model_type": "qwen3"} | rotation
    assert read(data).rope_theta == theta
    found = transformers.Qwen3Config.from_dict(copy.deepcopy(data))
    assert found.rope_parameters["rope_theta"] == theta


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = [
    (T5_XXL | {"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu' is not supported"),
    (T5_XXL | {"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu' is not"),
    ({"model_type": "t5"}, "feed_forward_proj = 'relu' is not supported"),
    (T5_XXL | {"relative_attention_num_buckets": 30}, "relative_attention_num_buckets = 30 is"),
    (T5_XXL | {"d_model": 0}, "d_model = 0 must be above 0"),
    (UMT5_XXL | {"rope_theta": 1e4}, "the key rope_theta = 10000.0 is not supported"),
    (QWEN3_4B | {"rope_scaling": YARN}, "rope_type = 'yarn' is not supported"),
    (QWEN3_4B | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    (QWEN3_4B | {"rope_parameters": 3}, "rope_parameters = 3 is not supported"),
    (QWEN3_4B | {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    (QWEN3_4B | {"layer_types": ["sliding_attention"]}, "layer_types = .*sliding_attention"),
    (QWEN3_4B | {"attention_bias": True}, "attention_bias = True is not supported"),
    (QWEN3_4B | {"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide"),
    (QWEN3_4B | {"head_dim": 127}, "head_dim = 127 cannot be split into halves"),
    (QWEN2_5_VL_7B | {"rope_scaling": YARN}, "rope_type = 'yarn' is not supported"),
    (QWEN2_5_VL_7B | {"hidden_size": 3585}, "hidden_size = 3585 cannot be split into heads"),
    (QWEN2_5_VL_7B | {"num_attention_heads": 56}, "mrope_section = .* is not half of the head"),
    (QWEN_IMAGE | {"text_config": {"model_type": "qwen3"}}, "text_config is not one of"),
    (QWEN_IMAGE | {"quantization_config": {"bits": 4}}, "the key quantization_config = "),
    (GEMMA2_2B | {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
    (GEMMA2_2B | {"use_bidirectional_attention": True}, "the key use_bidirectional_attention = "),
    (GEMMA2_2B | {"attn_logit_softcapping": None}, "attn_logit_softcapping = None is not"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_other_configs_are_refused_in_a_line(data, message):
    with pytest.raises(InputError, match=f"^text_encoder/config.json: .*{message}") as refusal:
        read(data)
    assert "\n" not in str(refusal.value)


def test_a_config_made_in_python_is_refused_too():
    with pytest.raises(ValueError, match="model_type = 'mt5' is not supported"):
        T5Config(model_type="mt5")
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu' is not supported"):
        T5Config(feed_forward_proj="relu")
