"""With the same random weights, IP-Adapters and the U-Nets that they prompt equal diffusers'."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from jaxdiff.checkpoint.ip_adapter import open_ip_adapter
from jaxdiff.devices import compilation, parallel
from jaxdiff.errors import InputError
from jaxdiff.images.clip_pixels import clip_pixels
from jaxdiff.models import ip_adapter
from jaxdiff.models.ip_adapter import IPAdapterConfig, IPAdapterModel, ResamplerConfig
from jaxdiff.models.text import clip
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.weights.load import file_shapes, open_network
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import networks  # noqa: E402
from test_controlnets import UNETS, drawn, inputs_of, load_unet, nchw, nhwc, unet_of  # noqa: E402
from test_full_size import UNET_15, UNET_XL  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 40,
    "hidden_act": "gelu",
}
SCALE = 0.6
PIPELINES = {
    "SD 1.5": diffusers.StableDiffusionPipeline,
    "XL": diffusers.StableDiffusionXLPipeline,
}


def widths_of(unet) -> list[int]:
    """The widths of diffusers' attentions to the text, in its own order."""
    layers = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [unet.get_submodule(each).to_q.out_features for each in layers if "attn2" in each]


def shapes_of(kind: str, unet) -> dict[str, tuple[int, ...]]:
    """The published keys of an adapter for a U-Net and `ENCODER`; the sizes are small."""
    hidden, vector, context = 48, 40, unet.config.cross_attention_dim
    width, inner, tokens = 24, 128, 5
    shapes = {}
    if kind == "plain":
        shapes |= {"proj.weight": (4 * context, vector), "proj.bias": (4 * context,)}
        shapes |= {"norm.weight": (context,), "norm.bias": (context,)}
    elif kind == "full-face":
        shapes |= {"proj.0.weight": (hidden, hidden), "proj.0.bias": (hidden,)}
        shapes |= {"proj.2.weight": (context, hidden), "proj.2.bias": (context,)}
        shapes |= {"proj.3.weight": (context,), "proj.3.bias": (context,)}
    else:
        shapes |= {"latents": (1, tokens, width)}
        shapes |= {"proj_in.weight": (width, hidden), "proj_in.bias": (width,)}
        shapes |= {"proj_out.weight": (context, width), "proj_out.bias": (context,)}
        shapes |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
        for i in range(4):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
            shapes |= {
                f"layers.{i}.0.to_q.weight": (inner, width),
                f"layers.{i}.0.to_kv.weight": (2 * inner, width),
                f"layers.{i}.0.to_out.weight": (width, inner),
                f"layers.{i}.1.1.weight": (4 * width, width),
                f"layers.{i}.1.3.weight": (width, 4 * width),
            }
    pairs = {
        f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight": (size, context)
        for i, size in enumerate(widths_of(unet))
        for part in "kv"
    }
    return {f"image_proj.{key}": shape for key, shape in shapes.items()} | pairs


def write(folder: Path, unet, *kinds: str) -> list[Path]:
    """Writes an adapter of each kind as published, and one image encoder."""
    config = transformers.CLIPVisionConfig(**ENCODER)
    encoder = drawn(transformers.CLIPVisionModelWithProjection(config), "encoder")
    encoder.save_pretrained(folder / "image_encoder")
    files = [folder / f"{kind}.safetensors" for kind in kinds]
    for kind, file in zip(kinds, files, strict=True):
        shapes = shapes_of(kind, unet)
        save_file({key: networks.weight(key, shape) for key, shape in shapes.items()}, file)
    return files


def pipeline_of(variant: str, unet, files: list[Path]):
    """diffusers' pipeline of a U-Net with adapters loaded; it lacks what they do not need."""
    absent = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": None}
    if variant == "XL":
        absent |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        absent |= {"safety_checker": None, "feature_extractor": None}
        absent["requires_safety_checker"] = False
    pipeline = PIPELINES[variant](unet=unet, **absent)
    names = [file.name for file in files]
    pipeline.load_ip_adapter(files[0].parent, subfolder="", weight_name=names)
    return pipeline


class Ours(NamedTuple):
    """An adapter of ours, loaded from its files."""

    kind: str
    graphs: tuple[nnx.GraphDef, nnx.GraphDef]
    params: tuple[dict, dict]

    def embedded(self, pixels, dtype=np.float32) -> jax.Array:
        """What is read of images [batch, size, size, 3]; the first half is negative."""

        def run(params, pixels):
            encoder = nnx.merge(self.graphs[1], params)
            found = ip_adapter.embedded(encoder, self.kind, pixels)
            negative = ip_adapter.embedded_negative(encoder, self.kind, dtype)
            return jnp.concatenate([jnp.broadcast_to(negative, found.shape), found])

        return compilation.jit(run)(self.params[1], pixels.astype(dtype))

    def __call__(self, embeddings) -> list[tuple[jax.Array, jax.Array]]:
        run = compilation.jit(lambda params, x: nnx.merge(self.graphs[0], params)(x))
        return run(self.params[0], embeddings)


def opened(file: Path, dtype=np.float32) -> Ours:
    files = open_ip_adapter(str(file))
    shapes = {key: tensor.shape for key, tensor in files.tensors.items()}
    parts = (
        (IPAdapterModel, IPAdapterConfig.from_shapes(files.kind, shapes), files.tensors),
        (
            clip.CLIPVisionModelWithProjection,
            clip.CLIPImageEncoderConfig.from_json(files.encoder_config),
            files.encoder_tensors,
        ),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), parallel.AXES)
    graphs, params = [], []
    for (network, config, tensors), rules in zip(
        parts, (ip_adapter.SHARDING, clip.SHARDING), strict=True
    ):
        graph, places = abstract_network(network, config)
        graphs.append(graph)
        params.append(open_network(places, rules, tensors, dtype, mesh).load())
    return Ours(files.kind, tuple(graphs), tuple(params))


def images() -> list[Image.Image]:
    """Two, of which one is wide and the other tall."""
    random = np.random.default_rng(0)
    sizes = (48, 80), (70, 33)
    return [Image.fromarray(random.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def pixels() -> np.ndarray:
    return np.stack([clip_pixels(np.asarray(image), 32) for image in images()])


def guided(variant: str) -> dict[str, np.ndarray]:
    """The inputs of a U-Net for two images, each with its negative half: [batch of 4]."""
    return {name: np.concatenate([each] * 2) for name, each in inputs_of(variant).items()}


def reference_embedded(pipeline, kind: str) -> torch.Tensor:
    """What diffusers reads of `images`, the negative half first."""
    with torch.no_grad():
        found, negative = pipeline.encode_image(images(), "cpu", 1, kind != "plain")
    return torch.cat([negative, found])


def reference(unet, inputs, embeddings: list[torch.Tensor]) -> np.ndarray:
    given = {name: torch.tensor(array) for name, array in inputs.items()}
    added = {"image_embeds": [each[:, None] for each in embeddings]}  # one image each
    if "pooled" in given:
        added |= {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    with torch.no_grad():
        output = unet(
            nchw(inputs["latents"]),
            given["timesteps"],
            given["context"],
            added_cond_kwargs=added,
            return_dict=False,
        )
    return nhwc(output[0])


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("SD 1.5", kind) for kind in ("plain", "plus", "full-face")),
        *(("XL", kind) for kind in ("plain", "plus")),
    ],
)
def test_the_embeddings_and_the_prompted_output(variant, kind, tmp_path):
    unet, inputs = unet_of(variant), guided(variant)
    run = load_unet(unet, tmp_path / "unet")
    files = write(tmp_path, unet, kind)
    pipeline, ours = pipeline_of(variant, unet, files), opened(files[0])
    assert ours.kind == kind

    seen = pipeline.feature_extractor(images(), return_tensors="pt").pixel_values
    np.testing.assert_allclose(pixels(), nhwc(seen), atol=1e-6)
    theirs = reference_embedded(pipeline, kind)
    embeddings = ours.embedded(pixels())
    assert networks.difference(embeddings, theirs.numpy()) <= networks.BOUND
    assert np.any(embeddings[2] != embeddings[3])
    assert np.any(embeddings[0]) == (kind != "plain")

    pipeline.set_ip_adapter_scale(0.0)
    plain = reference(unet, inputs, [theirs])
    pipeline.set_ip_adapter_scale(SCALE)
    expected = reference(unet, inputs, [theirs])
    scales = np.full(4, SCALE, np.float32)
    prompts = ip_adapter.image_prompts([(ours(embeddings), scales)])
    output = run(**inputs, image_prompts=prompts)
    assert networks.difference(output, expected) <= networks.BOUND
    assert networks.difference(plain, expected) > 0.01


def test_several_adapters_are_summed_and_each_image_has_scales_of_its_own(tmp_path):
    variant, kinds = "XL", ("plain", "plus")
    unet, inputs = unet_of(variant), guided(variant)
    run = load_unet(unet, tmp_path / "unet")
    files = write(tmp_path, unet, *kinds)
    pipeline, adapters = pipeline_of(variant, unet, files), [opened(file) for file in files]
    theirs = [reference_embedded(pipeline, kind) for kind in kinds]
    scales = np.array([[0.25, 1.0, 0.5, 0.0], [1.5, 0.75, 0.0, 0.0]], np.float32)
    expected = []
    for image, of_image in enumerate(scales.T.tolist()):
        pipeline.set_ip_adapter_scale(of_image)
        expected.append(reference(unet, inputs, theirs)[image])
    pairs = [each(each.embedded(pixels())) for each in adapters]
    prompts = ip_adapter.image_prompts(list(zip(pairs, scales, strict=True)))
    output = run(**inputs, image_prompts=prompts)
    assert networks.difference(output, np.stack(expected)) <= networks.BOUND
    assert networks.difference(output[3], np.asarray(run(**inputs)[3])) <= 1e-6


def test_tokens_of_several_images_are_one_prompt(tmp_path):
    """As in diffusers, where one image of the batch has two images in its prompt."""
    variant = "SD 1.5"
    unet, inputs = unet_of(variant), inputs_of(variant)
    run = load_unet(unet, tmp_path / "unet")
    files = write(tmp_path, unet, "plain")
    pipeline, ours = pipeline_of(variant, unet, files), opened(files[0])
    both = pipeline.prepare_ip_adapter_image_embeds([images()], None, "cpu", 1, True)
    added = {"image_embeds": both}
    with torch.no_grad():
        arrays = [torch.tensor(inputs[name]) for name in ("timesteps", "context")]
        expected = unet(nchw(inputs["latents"]), *arrays, added_cond_kwargs=added).sample

    def pairs(params, embeddings):
        network = nnx.merge(ours.graphs[0], params)
        tokens = network.tokens(embeddings)
        return network.keys_and_values(tokens.reshape(2, -1, tokens.shape[-1]))

    made = compilation.jit(pairs)(ours.params[0], ours.embedded(pixels()))
    prompts = ip_adapter.image_prompts([(made, np.ones(2, np.float32))])
    output = run(**inputs, image_prompts=prompts)
    assert networks.difference(output, nhwc(expected)) <= networks.BOUND


def test_reused_deep_features_leave_the_last_layer_its_prompts(tmp_path):
    variant = "SD 1.5"
    unet, inputs = unet_of(variant), guided(variant)
    (file,) = write(tmp_path, unet, "plain")
    ours, run = opened(file), load_unet(unet, tmp_path / "unet")
    pairs = ours(ours.embedded(pixels()))
    prompts = ip_adapter.image_prompts([(pairs, np.ones(4, np.float32))])
    whole, deep = run(**inputs, image_prompts=prompts, method="evaluate")
    reused, _ = run(**inputs, image_prompts=prompts, deep=deep, method="evaluate")
    assert networks.difference(reused, np.asarray(whole)) <= 1e-6
    without, _ = run(**inputs, deep=deep, method="evaluate")
    assert networks.difference(without, np.asarray(whole)) > 1e-3


def test_bfloat16_and_recomputed_activations(tmp_path):
    """The scales stay float32; gradients of prompted networks can be taken with `remat`."""
    variant = "XL"
    unet, inputs = unet_of(variant), guided(variant)
    (file,) = write(tmp_path, unet, "plus")
    exact, halved = opened(file), opened(file, jnp.bfloat16)
    embeddings = exact.embedded(pixels())
    half = halved.embedded(pixels(), jnp.bfloat16)
    pairs = halved(half)
    found, expected = (half, *pairs[0]), (embeddings, *exact(embeddings)[0])
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert networks.difference(ours.astype(np.float32), np.asarray(wanted)) <= 0.05

    graph, shapes = abstract_network(
        lambda config, rngs: UNet2DConditionModel(config, rngs=rngs, remat=True),
        UNetConfig.from_json({key: listed(value) for key, value in UNETS[variant][0].items()}),
    )
    prompts = ip_adapter.image_prompts([(pairs, np.ones(4, np.float32))])
    arrays = {name: array.astype(jnp.bfloat16) for name, array in inputs.items()}

    def total(params, prompts):
        output = nnx.merge(graph, params)(**arrays, image_prompts=prompts)
        assert output.dtype == jnp.bfloat16
        return output.sum()

    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    gradients = jax.eval_shape(jax.grad(total, argnums=1), params, prompts)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, prompts)


def listed(value):
    return list(value) if isinstance(value, tuple) else value


FULL_SIZE = {  # the image projection's millions of weights, published for Plus
    "SD 1.5": (UNET_15, 768, ResamplerConfig(768, 4, 768, 3072), 16, 29.9),
    "XL": (UNET_XL, 2048, ResamplerConfig(1280, 4, 1280, 5120), 70, 83.0),
}


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_the_order_of_the_attentions_and_the_sizes_at_full_size(variant):
    said, context, resampler, count, millions = FULL_SIZE[variant]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(said)
    widths = UNetConfig.from_json(said).cross_attention_widths
    assert list(widths) == widths_of(unet)
    assert len(widths) == count

    config = IPAdapterConfig("plus", 1280, context, 16, widths, resampler)
    _, places = abstract_network(IPAdapterModel, config)
    shapes = file_shapes(places)
    assert IPAdapterConfig.from_shapes("plus", shapes) == config
    projection = [shape for key, shape in shapes.items() if key.startswith("image_proj.")]
    assert round(sum(map(math.prod, projection)) / 1e6, 1) == millions

    mesh = jax.sharding.AbstractMesh((1, 4), parallel.AXES)
    splits = parallel.parameter_shardings(mesh, places, ip_adapter.SHARDING)
    held = jax.tree.map(
        lambda leaf, split: math.prod(split.shard_shape(leaf.shape)), places, splits
    )
    assert sum(jax.tree.leaves(held)) <= 0.28 * sum(map(math.prod, shapes.values()))

    plain = dataclasses.replace(config, kind="plain", image_width=1024, tokens=4, resampler=None)
    full = dataclasses.replace(config, kind="full-face", tokens=0, resampler=None)
    for other in (plain, full):
        shapes = file_shapes(abstract_network(IPAdapterModel, other)[1])
        assert IPAdapterConfig.from_shapes(other.kind, shapes) == other


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        ("plain", "image_proj.proj.weight", None),
        ("plain", "image_proj.norm.weight", (0,)),
        ("full-face", "image_proj.proj.3.weight", (3, 3)),
        ("plus", "image_proj.latents", (5, 24)),
        ("plus", "image_proj.layers.0.0.to_q.weight", (96, 24)),
        ("plus", "ip_adapter.3.to_k_ip.weight", (7,)),
        ("plus", "ip_adapter.1.to_k_ip.weight", None),
    ],
)
def test_files_with_impossible_shapes_are_refused(kind, key, shape):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNETS["SD 1.5"][0])
    shapes = shapes_of(kind, unet)
    assert IPAdapterConfig.from_shapes(kind, shapes).kind == kind
    shapes[key] = shape
    if shape is None:
        del shapes[key]
    with pytest.raises(InputError, match=f"^the IP-Adapter[^\n]*{key}[^\n]*$"):
        IPAdapterConfig.from_shapes(kind, shapes)


def test_prompts_for_another_number_of_attentions_are_refused(tmp_path):
    run = load_unet(unet_of("SD 1.5"), tmp_path)
    with pytest.raises(ValueError, match="image prompts for 3 attentions, but there are"):
        run(**inputs_of("SD 1.5"), image_prompts=[()] * 3)
