"""Low-rank adapters in training: how they are made, merged and saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.training import low_rank

RANK = 3


@pytest.fixture(scope="module")
def shapes() -> dict:
    networks = networks_of(open_checkpoint("shapes64")).networks
    return {
        "unet": networks["unet"].shapes,
        "text_encoder": networks["text_encoder"].shapes,
    }


@pytest.fixture(scope="module")
def adapters(shapes) -> dict:
    return low_rank.init(shapes, RANK, jax.random.key(0))


def trained(adapters: dict) -> dict:
    """Returns adapters as after training, with B no longer zero."""
    return jax.tree.map(
        lambda leaf: leaf + 0.01 * jnp.arange(leaf.size).reshape(leaf.shape), adapters
    )


def test_only_the_four_matrices_of_every_attention_have_adapters(shapes, adapters):
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(adapters)
    ]
    kernels = [
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/kernel")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        if any(f"'{part}'" in str(path) for part in ("attn1", "attn2", "self_attn"))
        and "'kernel'" in str(path)
    ]
    assert sorted(paths) == sorted(f"{k}/lora_{part}" for k in kernels for part in "AB")
    assert len(kernels) == 2 * 4 * 7 + 4 * 3  # two attentions in 7 blocks, one in 3 text layers


def test_adapters_add_their_scaled_product_which_is_zero_at_first(shapes, adapters):
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    same = low_rank.merged(params, adapters, alpha=6.0)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, same))
    adapters = trained(adapters)
    changed = low_rank.merged(params, adapters, alpha=6.0)
    before, layer, after = (
        tree["unet"]["mid_block"]["attentions"][0]["transformer_blocks"][0]["attn2"]["to_k"]
        for tree in (params, adapters, changed)
    )
    wanted = before["kernel"] + 6.0 / RANK * layer["lora_A"] @ layer["lora_B"]
    np.testing.assert_allclose(after["kernel"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(changed["unet"]["conv_in"]["kernel"], 1.0)


def test_only_the_adapters_have_a_gradient(shapes, adapters):
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["text_encoder"])

    def loss(adapters):
        return sum(
            jnp.sum(leaf) for leaf in jax.tree.leaves(low_rank.merged(params, adapters, 0.0))
        )

    gradient = jax.grad(loss)(adapters["text_encoder"])
    layer = gradient["encoder"]["layers"][0]["self_attn"]["q_proj"]
    assert float(jnp.abs(layer["lora_B"]).max()) > 0
    assert float(jnp.abs(layer["lora_A"]).max()) == 0  # while B is zero


def test_the_file_has_pytorchs_names_and_axes_and_the_scale_in_b(adapters, tmp_path):
    adapters = trained(adapters)
    low_rank.save_lora(adapters, 6.0, tmp_path / low_rank.FILE)
    assert [path.name for path in tmp_path.iterdir()] == [low_rank.FILE]
    stored = load_file(tmp_path / low_rank.FILE)
    assert len(stored) == len(jax.tree.leaves(adapters))
    layer = adapters["text_encoder"]["encoder"]["layers"][1]["self_attn"]["out_proj"]
    key = "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_{}.weight"
    np.testing.assert_array_equal(stored[key.format("A")], layer["lora_A"].T)
    np.testing.assert_allclose(stored[key.format("B")], 6.0 / RANK * layer["lora_B"].T, rtol=1e-6)
    assert (
        "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in stored
    )
