"""Weights of 8 bits: which, how exact, how many bytes, and what images they make."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_controlnets
import small_families
from flax import nnx

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import formats
from jaxdiff.engine import steering
from jaxdiff.engine.engine import TextToImage
from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.families.opening import open_ensemble
from jaxdiff.families.stable_diffusion_model import Conditioning
from jaxdiff.models.linear import Linear
from jaxdiff.request import Options, Request
from jaxdiff.weights.load import name_of
from jaxdiff.weights.quantization import (
    FORMATS,
    IN_BLOCK,
    Quantized,
    is_quantized,
    quantize,
    restored,
)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


REQUESTS = [Request(prompt=prompt, seed=5) for prompt in ("a red circle", "two stars", "a square")]


def names(shapes: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's parameters by their names."""
    return {name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_output_has_a_scale_and_a_small_error(kind):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 40, 8)) * 10.0 ** np.arange(-4, 4)
    kernel[..., 3] = 0
    made = quantize(
        kernel.astype(np.float32), Quantized(jax.ShapeDtypeStruct((), FORMATS[kind]), None)
    )
    assert made.values.dtype == FORMATS[kind]
    assert made.scale.shape == (8,)
    again = np.asarray(restored({"a": made}, jnp.float32)["a"])
    largest = np.abs(kernel).max(axis=(0, 1, 2))
    error = np.abs(again - kernel)
    if FORMATS[kind] == np.int8:
        assert (error <= largest / 127 * 0.5001).all()
    else:  # three bits of mantissa, and 2**-9 as the smallest number
        assert (error <= np.maximum(np.abs(kernel) / 16, largest / 448 * 2**-10) * 1.0001).all()
    assert (again[..., 3] == 0).all()
    np.testing.assert_allclose(np.abs(again).max(axis=(0, 1, 2)), largest, rtol=1e-6)


@pytest.mark.parametrize("family", small_families.SMALL)
def test_blocks_are_quantised_and_what_is_outside_is_kept(family, tmp_path):
    model = networks_of(
        open_checkpoint(small_families.save(small_families.SMALL[family], tmp_path))
    )
    for component in (model.denoiser.component, *model.text_encoders):
        shapes = names(model.networks[component].shapes)
        inside = {name for name in shapes if IN_BLOCK.search(name)}
        assert len(inside) >= 4
        assert all(len(shapes[name]) >= 2 for name in inside)
        kept = {name for name in shapes.keys() - inside if name.endswith("kernel")}
        assert not {name.partition(".")[0] for name in kept} & {"transformer_blocks", "encoder"}
        first_or_last = ("proj_out", "x_embedder", "norm_out", "embed_tokens", "img_in")
        assert not [name for name in inside if name.startswith(first_or_last)]


def test_a_product_of_8_bit_integers_is_as_exact_as_its_scales():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 64)).astype(np.float32) * 10.0 ** np.arange(-2, 3)[:, None]
    x[0, 0] = 0
    kernel = rng.normal(size=(64, 8)).astype(np.float32)
    quantized = quantize(kernel, Quantized(jax.ShapeDtypeStruct((64, 8), np.int8), None, True))
    layer = Linear(64, 8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    params = nnx.to_pure_dict(params) | {"kernel": quantized, "bias": np.arange(8.0)}
    program = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    assert "tensor<64x8xi8>) -> tensor<2x5x8xi32>" in program.lower(params, x).as_text()
    found = np.asarray(program(params, x)) - np.arange(8)
    for vector, product in zip(x.reshape(-1, 64), found.reshape(-1, 8), strict=True):
        step, steps = np.abs(vector).max() / 127, np.asarray(quantized.scale)
        most = (step * np.abs(kernel).sum(axis=0) + steps * np.abs(vector).sum()) / 2
        error = np.abs(product - vector @ kernel)
        assert (error <= most + 64 * step * steps / 4 + 1e-5 * np.abs(product)).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("shapes64", "w8a8"), pytest.param("shapes64-flow", "int8", marks=pytest.mark.slow)],
)
def test_images_change_little_and_do_not_depend_on_their_neighbours(name, kind, record_property):
    whole, small = (jaxdiff.load(name, weights=each) for each in ("full", kind))
    before, after = (model.generate(REQUESTS) for model in (whole, small))
    errors = [
        np.mean((one.pixels.astype(float) - other.pixels) ** 2)
        for one, other in zip(before, after, strict=True)
    ]
    psnr = 10 * np.log10(255**2 / np.array(errors))
    record_property("psnr", f"{psnr.min():.1f}")
    assert (35 if kind == "int8" else 20) < psnr.min() < 70
    (alone,) = small.generate(REQUESTS[1:2])
    np.testing.assert_array_equal(alone.pixels, after[1].pixels)


@pytest.mark.parametrize("name", ["shapes64", "shapes64-flow"])
def test_half_of_the_bytes_of_bfloat16(name):
    counts = []
    for kind in ("full", "int8"):
        model = jaxdiff.load(name, weights=kind, dtype="bfloat16")
        networks = model._sampler._weights.denoisers, model._sampler._denoisers[0].prompts.params
        counts.append(sum(leaf.nbytes for leaf in jax.tree.leaves(networks)))
    assert counts[1] <= 0.55 * counts[0]


def test_kernels_are_restored_inside_the_loop():
    """Outside of it, they would fill the memory for the whole time."""
    model = jaxdiff.load("shapes64", weights="int8")
    request = model.prepare(REQUESTS[0])
    sampler = model._sampler
    program = sampler._programs[sampler._program(request, 8)].result().as_text()
    entry = program[program.index("\nENTRY") :]
    (loop,) = (line for line in entry.splitlines() if " while(" in line and "s8[" in line)
    network = sampler._denoisers[0].model.networks["unet"]
    inside = [name for name in names(network.shapes) if IN_BLOCK.search(name)]
    assert loop.count("s8[") == len(inside)


def test_a_job_says_that_its_weights_are_quantised(tiny_checkpoint, tmp_path, capsys):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps({"prompt": "a", "seed": 1}))
    command = ["generate", "--manifest", str(manifest), "--output", str(tmp_path / "out")]
    command += ["--model", str(tiny_checkpoint), "--steps=2", "--weights"]
    assert cli.main([*command, "int8"]) == 0
    (file,) = (tmp_path / "out" / "data").iterdir()
    (sample,) = formats.read_tar(file)
    assert "weights=int8" in sample.record["options"]
    capsys.readouterr()
    assert cli.main([*command, "fp8"]) == 2
    assert "holds another run (weights" in capsys.readouterr().err
    assert cli.main([*command, "int4"]) == 2
    assert "weights must be one of full, int8, fp8, w8a8" in capsys.readouterr().err
    assert cli.main([*command[:5], "--model=shapes64-x4", "--weights=int8"]) == 2
    assert "--weights has no effect on" in capsys.readouterr().err


def test_networks_have_as_many_quantised_leaves_as_kernels_in_blocks(tiny_checkpoint):
    model = jaxdiff.load(tiny_checkpoint, weights="fp8")
    (params,) = model._sampler._weights.denoisers
    found = [*filter(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))]
    network = model._sampler._denoisers[0].model.networks["unet"]
    assert len(found) == sum(bool(IN_BLOCK.search(name)) for name in names(network.shapes))


@pytest.mark.parametrize(
    ("family", "kind"), [("unet", "int8"), pytest.param("flux", "w8a8", marks=pytest.mark.slow)]
)
def test_controlnets_steer_nearly_as_without(tiny_checkpoint, tmp_path, family, kind):
    model, net = tiny_checkpoint, tmp_path / "net"
    if family == "unet":
        small_controlnets.of_unet(net, 1)
        text = Conditioning(normal(1, 24, 32))
    else:
        small_controlnets.of_flux(net, 1)
        model = small_families.save(small_families.SMALL["FLUX.1 dev"], tmp_path / "model")
        text = {"context": normal(1, 8, 32), "pooled": normal(1, 32)}
    found = []
    for each in ("full", kind):
        ensemble = open_ensemble(model, controlnet=[str(net)])
        (denoiser,) = TextToImage(ensemble, Options(weights=each))._sampler._denoisers
        nets, params = denoiser.denoising.controls, denoiser.controls[0].load()
        shape = 1, 4, 4, 16 if nets[0].sees_latents else 4
        seen = normal(*shape) if nets[0].sees_latents else np.full((1, 32, 32, 3), 99, np.uint8)

        def residuals(params, nets=nets, seen=seen, shape=shape):
            steer = steering.steer(nets, [params], [(seen, np.ones(1))], np.ones(1), guesses=False)
            return steer(normal(*shape), jnp.float32(500), text, text)

        leaves = jax.tree.leaves(jax.jit(residuals)(params))
        found.append((params, np.concatenate([np.ravel(leaf) for leaf in leaves])))
    (whole, before), (small, after) = found
    kernels = {name for name in names(whole) if IN_BLOCK.search(name)}
    leaves = jax.tree_util.tree_leaves_with_path(small, is_leaf=is_quantized)
    quantized = {name_of(path) for path, leaf in leaves if is_quantized(leaf)}
    assert quantized == kernels
    assert not {name for name in kernels if name.startswith("controlnet_")}
    # A kernel's errors are even over steps of its largest weight / 127, and that is at most 5
    # standard deviations; with w8a8, those of its inputs are alike. They add up as squares.
    of_layer = 5 / 127 / np.sqrt(12) * np.sqrt(1 + (kind == "w8a8"))
    error = np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))
    assert 1e-4 < error < of_layer * np.sqrt(len(kernels))
