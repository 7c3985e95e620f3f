"""Networks from weights that are drawn from their keys: the same wherever they are drawn."""

import json
import math
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.devices import compilation, parallel
from jaxdiff.families import FAMILIES, flux_model
from jaxdiff.families import networks as families
from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION_XL
from jaxdiff.models import sd3
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.controlnet import ControlNetConfig, ControlNetModel
from jaxdiff.models.text import clip
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.weights.load import file_shapes, key_of, load_params, places
from jaxdiff.weights.network import abstract_network

BOUND = 1e-4  # of a component's `difference` from the reference
POOLED = 40  # the width of the small models' pooled text
NETWORKS = {
    "controlnet": (ControlNetConfig, lambda config: ControlNetModel),
    "text_encoder": (clip.CLIPTextConfig, clip.network),
    "text_encoder_2": (clip.CLIPTextConfig, clip.network),
    "unet": (UNetConfig, lambda config: UNet2DConditionModel),
    "vae": (AutoencoderKLConfig, lambda config: AutoencoderKL),
}


def _architectures() -> dict[str, families.Architecture]:
    """Those of the transformer families by the networks' classes in diffusers or transformers.

    Of Qwen2.5-VL, that is the language model alone.
    """
    found = {"UMT5EncoderModel": families.T5}  # of no family yet
    found["FluxControlNetModel"] = flux_model.CONTROLNET  # of no pipeline
    for family in FAMILIES.values():
        if isinstance(made := family.networks(), families.Networks):
            for name, component in family.components.items():
                classes = (component.class_name, *component.other_class_names)
                found = dict.fromkeys(classes, made.architectures[name]) | found
    return found


ARCHITECTURES = _architectures()
POSITIONS = "pos_embed.pos_embed"  # no weights: each library computes its own
LAYERS = (1, -1)  # the hidden states of language models that are compared


def load(network: str, folder: Path) -> Callable:
    """The network in a folder that diffusers or transformers wrote, read by our loader."""
    (file,) = folder.glob("*.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return _compiled(
        network, config, lambda shapes: read_weights(STABLE_DIFFUSION_XL.components[network], file)
    )


def build(network: str, config: dict, weight: Callable[[str, tuple], np.ndarray]) -> Callable:
    """The network of a parsed config, with `weight(key, shape)`, as a file has them."""
    return _compiled(
        network,
        config,
        lambda shapes: {
            key: SimpleNamespace(shape=shape, read=partial(weight, key, shape))
            for key, shape in file_shapes(shapes).items()
        },
    )


def _compiled(network: str, config: dict, tensors: Callable) -> Callable:
    """A function `run(*arrays, method="__call__", options={}, **arrays)`; options are static."""
    config_class, network_class = NETWORKS[network]
    config = config_class.from_json(config)
    graph, shapes = abstract_network(network_class(config), config)
    params = load_params(places(shapes, np.float32), tensors(shapes))

    @cache
    def program(method, *options):
        def call(params, arrays, named):
            return getattr(nnx.merge(graph, params), method)(*arrays, **named, **dict(options))

        return compilation.jit(call)

    def run(*arrays, method="__call__", options=None, **named):
        return program(method, *(options or {}).items())(params, arrays, named)

    return run


def architecture(config: dict) -> families.Architecture:
    """The architecture of a parsed config of a transformer family, which names its class."""
    return ARCHITECTURES[config.get("_class_name") or config["architectures"][0]]


def read(config: dict):
    """A parsed config of a transformer family as our dataclass."""
    return architecture(config).config.from_json(config)


def shapes_of(config: dict, **options) -> tuple[nnx.GraphDef, dict]:
    """The graph and the shapes of its network; the options are the network's own."""
    ours = read(config)
    return abstract_network(partial(architecture(config).module(ours), **options), ours)


def opened(config: dict, dtype=np.float32, **options) -> tuple[nnx.GraphDef, dict]:
    """The graph of its network and the weights of `weight`, read by our loader."""
    graph, shapes = shapes_of(config, **options)

    def numbers(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key == POSITIONS:
            return np.asarray(sd3.position_table(read(config)))
        return weight(key, shape)

    tensors = {
        key: SimpleNamespace(shape=shape, read=partial(numbers, key, shape))
        for key, shape in file_shapes(shapes).items()
    }
    return graph, load_params(places(shapes, dtype), tensors)


def shares(config: dict, devices: int = 4) -> tuple[dict[str, int], dict[str, int]]:
    """How many numbers each weight has, and how many of them a device of `model` holds."""
    _, shapes = shapes_of(config)
    mesh = jax.sharding.AbstractMesh((1, devices), parallel.AXES)
    rules = architecture(config).sharding
    splits = parallel.parameter_shardings(mesh, shapes, rules)
    held = jax.tree.map(
        lambda leaf, split: math.prod(split.shard_shape(leaf.shape)), shapes, splits
    )
    whole = jax.tree.map(lambda leaf: math.prod(leaf.shape), shapes)
    return tuple(
        {key_of(path): size for path, size in jax.tree_util.tree_leaves_with_path(sizes)}
        for sizes in (whole, held)
    )


def outputs_of(config: dict, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """What the network of a transformer family makes of inputs, by name; of text, what is seen."""
    graph, params = opened(config)

    def run(params, inputs):
        network, ours = nnx.merge(graph, params), read(config)
        if ours.component == "transformer":
            return {"output": network(**inputs)}
        if ours.component == "vae":
            mean, log_variance = network.encode(inputs["images"])
            images = network.decode(ours.unscale(inputs["latents"]))
            return {"mean": mean, "log_variance": log_variance, "images": images}
        if "d_model" in config:  # T5's
            return {"hidden": network(**inputs)}
        hidden = network(**inputs, layers=LAYERS)
        return {f"hidden {layer}": each for layer, each in zip(LAYERS, hidden, strict=True)}

    found = compilation.jit(run)(params, inputs)
    if read(config).component == "text_encoder":
        return {name: hidden[inputs["mask"]] for name, hidden in found.items()}
    return found


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal float32 numbers, a function of the name and the shape."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))  # frozen, unlike Generator's
    return generator.standard_normal(shape).astype(np.float32)


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of about the size that training ends at: no norm is one and no bias zero."""
    numbers = drawn(key, shape)
    if key.endswith(".bias"):
        return 0.1 * numbers
    if len(shape) == 1:  # of a norm
        return 1 + 0.1 * numbers
    if "_embedding.weight" in key:  # of tokens and positions
        return numbers
    return numbers / np.sqrt(np.prod(shape[1:])).astype(np.float32)


def inputs(network: str, config: dict, size: tuple[int, int] = (6, 10)) -> dict[str, np.ndarray]:
    """What a network of this parsed config is tried on; images and latents are NHWC.

    `size` is that of the U-Net's latents: by default odd from the second block on.
    """
    if network == "vae":
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return {
            "images": np.tanh(drawn("images", (1, 2 * factor, 3 * factor, 3))),
            "latents": drawn("latents", (1, 2, 3, config["latent_channels"])),
        }
    if network != "unet":
        tokens = np.arange(24).reshape(2, 12) * 37 % 500
        tokens[:, 5:7] = 99  # two ways of ending: with this token, or with the largest
        tokens[:, 8:] = config["vocab_size"] - 1
        return {"token_ids": tokens}
    found = {
        "latents": drawn("latents", (2, *size, config["in_channels"])),
        "timesteps": np.array([999, 17]),
        "context": drawn("context", (2, 12, config["cross_attention_dim"])),
    }
    if config.get("addition_embed_type"):
        width = config["projection_class_embeddings_input_dim"] - POOLED
        time_ids = np.array([[1024, 768, 0, 64, 512, 1023], [8, 2048, 3, 0, 6, 2]], np.float32)
        found["pooled"] = drawn("pooled", (2, POOLED))
        found["time_ids"] = time_ids[:, : width // config["addition_time_embed_dim"]]
    if config.get("time_cond_proj_dim"):
        found["guidance_scale"] = np.array([8.5, 1.0], np.float32)
    return found


def outputs(network: str, run: Callable, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """What our network makes of its inputs, by name."""
    if network == "vae":
        mean, log_variance = run(inputs["images"], method="encode")
        images = run(inputs["latents"], method="decode")
        return {"mean": mean, "log_variance": log_variance, "images": images}
    if network == "unet":
        return {"output": run(**inputs)}
    hidden, pooled = run(**inputs)
    earlier, again = run(**inputs, options={"layers_skipped": 1})
    unnormed, _ = run(**inputs, options={"layers_skipped": 1, "final_norm": False})
    np.testing.assert_array_equal(pooled, again)
    return {"hidden": hidden, "pooled": pooled, "earlier": earlier, "unnormed": unnormed}


def difference(ours: jax.Array, reference: np.ndarray) -> float:
    """Relative to the reference's norm."""
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
