"""LoRA files: every naming of the layers, the updates of the weights, and rejected files."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxdiff
from jaxdiff import cli
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble
from jaxdiff.images.image_files import pixel_sha256

RANK = 2
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LAYERS = {  # network: the layers that the LoRA of these tests changes
    "unet": (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0"),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"),
}
EVERY = [(network, layer) for network, layers in LAYERS.items() for layer in layers]
OLD_NAMES = {"to_out.0": "to_out", "q_proj": "to_q", "out_proj": "to_out"}


def halves(checkpoint, network: str, layer: str, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """Returns random down [rank, in] and up [out, rank] matrices, seeded by the layer's name."""
    rows, columns = checkpoint.weights(network)[f"{layer}.weight"].shape[:2]
    random = np.random.default_rng([*f"{network}{layer}".encode()])
    draw = random.standard_normal
    return draw((rank, columns)).astype(np.float32), draw((rows, rank)).astype(np.float32)


def diffusers_key(network: str, layer: str, part: str) -> str:
    layer = f"text_model.{layer}" if network != "unet" else layer
    return f"{network}.{layer}.lora_{'AB'[part == 'up']}.weight"


def first_diffusers_key(network: str, layer: str, part: str) -> str:
    for new, old in OLD_NAMES.items():
        layer = layer.removesuffix(new) + old if layer.endswith(new) else layer
    if network == "text_encoder":
        return f"text_encoder.text_model.{layer}_lora.{part}.weight"
    layers, _, last = layer.rpartition(".")
    return f"unet.{layers}.processor.{last}_lora.{part}.weight"


def second_diffusers_key(network: str, layer: str, part: str) -> str:
    if network == "text_encoder":
        return f"text_encoder.text_model.{layer}.lora_linear_layer.{part}.weight"
    return f"unet.{layer}.lora.{part}.weight"


def kohya_key(network: str, layer: str, part: str) -> str:
    prefix = "lora_unet_" if network == "unet" else "lora_te_text_model_"
    return f"{prefix}{layer.replace('.', '_')}.lora_{part}.weight"


def peft_key(network: str, layer: str, part: str) -> str:
    layer = f"text_model.{layer}" if network != "unet" else layer
    return f"base_model.model.{layer}.lora_{'AB'[part == 'up']}.weight"


KEYS = (diffusers_key, first_diffusers_key, second_diffusers_key, kohya_key, peft_key)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_ensemble(tiny_checkpoint).base


@pytest.fixture
def tensors(checkpoint) -> dict[str, np.ndarray]:
    """A LoRA with diffusers' names, which a test may modify."""
    return stored(checkpoint, diffusers_key)


def stored(checkpoint, key) -> dict[str, np.ndarray]:
    return {
        key(network, layer, part): half
        for network, layer in EVERY
        for part, half in zip(("down", "up"), halves(checkpoint, network, layer), strict=True)
    }


def save(tensors: dict, file: Path, **metadata: str) -> Path:
    save_file({key: np.ascontiguousarray(t) for key, t in tensors.items()}, file, metadata or None)
    return file


def change(checkpoint, adapted, network: str, layer: str) -> np.ndarray:
    """Returns the update of a layer."""
    after, before = (
        each.weights(network)[f"{layer}.weight"].read() for each in (adapted, checkpoint)
    )
    return after - before


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.__name__)
def test_the_product_is_added_with_every_naming_of_the_layers(
    checkpoint, tiny_checkpoint, tmp_path, key
):
    file = save(stored(checkpoint, key), tmp_path / "heart.safetensors")
    if key is peft_key:
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    adapted = open_ensemble(tiny_checkpoint, lora=[f"{file}:0.5"]).base
    for network, layer in EVERY:
        down, up = halves(checkpoint, network, layer)
        added = change(checkpoint, adapted, network, layer)
        np.testing.assert_allclose(added, 0.5 * up @ down, atol=1e-5)
    changed = sum(bool(t.updates) for n in LAYERS for t in adapted.weights(n).values())
    assert changed == len(EVERY)


def test_alphas_are_read_from_every_possible_place(checkpoint, tiny_checkpoint, tmp_path, tensors):
    layer = LAYERS["unet"][0]
    kohya = stored(checkpoint, kohya_key) | {
        kohya_key("unet", layer, "down").replace("lora_down.weight", "alpha"): np.float32(8),
    }
    in_metadata = {"unet.r": 2, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 2}
    by_pattern = in_metadata | {"unet.lora_alpha": 2, "unet.alpha_pattern": {layer: 8}}
    files = [save(kohya, tmp_path / "kohya.safetensors")]
    for name, config in {"all": in_metadata, "pattern": by_pattern}.items():
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        files.append(save(tensors, tmp_path / f"{name}.safetensors", **metadata))
    folder = tmp_path / "peft"
    folder.mkdir()
    files.append(save(stored(checkpoint, peft_key), folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    down, up = halves(checkpoint, "unet", layer)
    for file in files:
        adapted = open_ensemble(tiny_checkpoint, lora=[str(file)]).base
        added = change(checkpoint, adapted, "unet", layer)
        np.testing.assert_allclose(added, 8 / RANK * up @ down, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base model's weights as well"),
        ({"init_lora_weights": "OLoRA"}, "changes the base model's weights as well"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "could take forever to match"),
        ({"alpha_pattern": {"to_q": 4, "x" * 300: 4}}, "could take forever to match"),
        ({"alpha_pattern": {"to_q[": 4}}, "is not a regular expression"),
        ({"alpha_pattern": [4]}, "alpha_pattern is not a table"),
    ],
)
def test_configs_of_peft_that_cannot_be_followed_are_rejected(
    checkpoint, tiny_checkpoint, tmp_path, config, message
):
    file = save(stored(checkpoint, peft_key), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8} | config))
    with pytest.raises(InputError, match=message):
        open_ensemble(tiny_checkpoint, lora=[str(file)])


def test_convolutions_are_adapted_with_and_without_a_mid_matrix(
    checkpoint, tiny_checkpoint, tmp_path
):
    layer, random = "mid_block.resnets.0.conv1", np.random.default_rng(0)
    out, inputs, *_ = checkpoint.weights("unet")[f"{layer}.weight"].shape
    plain, between = (f"lora_unet_mid_block_resnets_{n}_conv1" for n in (0, 1))
    shapes = {
        f"{plain}.lora_down.weight": (RANK, inputs, 3, 3),
        f"{plain}.lora_up.weight": (out, RANK, 1, 1),
        f"{between}.lora_down.weight": (RANK, inputs, 1, 1),
        f"{between}.lora_mid.weight": (RANK, RANK, 3, 3),
        f"{between}.lora_up.weight": (out, RANK, 1, 1),
        # A 1x1 convolution is a matrix.
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (RANK, inputs),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (out, RANK),
    }
    drawn = {key: random.standard_normal(s).astype(np.float32) for key, s in shapes.items()}
    file = save(drawn, tmp_path / "locon.safetensors")
    adapted = open_ensemble(tiny_checkpoint, lora=[str(file)]).base
    downs, ups, last_ups = (drawn[key] for key in list(drawn)[:2] + list(drawn)[4:5])
    np.testing.assert_allclose(
        change(checkpoint, adapted, "unet", layer),
        np.einsum("or,rihw->oihw", ups[:, :, 0, 0], downs),
        atol=1e-4,
    )
    narrow, mid = drawn[f"{between}.lora_down.weight"], drawn[f"{between}.lora_mid.weight"]
    wanted = np.tensordot(last_ups[:, :, 0, 0], mid, (1, 0))  # [out, rank, 3, 3]
    wanted = np.moveaxis(np.tensordot(wanted, narrow[:, :, 0, 0], (1, 0)), -1, 1)
    added = change(checkpoint, adapted, "unet", layer.replace("resnets.0", "resnets.1"))
    np.testing.assert_allclose(added, wanted, atol=1e-4)
    down, up = list(drawn.values())[-2:]
    added = change(checkpoint, adapted, "unet", "mid_block.attentions.0.proj_in")
    np.testing.assert_allclose(added[:, :, 0, 0], up @ down, atol=1e-4)


def test_several_loras_are_added_up(checkpoint, tiny_checkpoint, tmp_path, tensors):
    one, two = (save(tensors, tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    adapted = open_ensemble(tiny_checkpoint, lora=[str(one), f"{two}:-0.25"]).base
    assert adapted.name == "tiny + one:1 + two:-0.25"
    network, layer = EVERY[0]
    down, up = halves(checkpoint, network, layer)
    added = change(checkpoint, adapted, network, layer)
    np.testing.assert_allclose(added, 0.75 * up @ down, atol=1e-5)


def test_the_fingerprint_covers_contents_weight_and_name_but_not_the_path(
    checkpoint, tiny_checkpoint, tmp_path, tensors
):
    def fingerprint(file: Path, weight: float = 1.0) -> str:
        return open_ensemble(tiny_checkpoint, lora=[f"{file}:{weight}"]).fingerprint

    file = save(tensors, tmp_path / "heart.safetensors")
    first = fingerprint(file)
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Path(shutil.copy(file, tmp_path / "elsewhere"))
    assert fingerprint(elsewhere) == first
    renamed = Path(shutil.copy(file, tmp_path / "crescent.safetensors"))
    others = {fingerprint(renamed), fingerprint(file, 0.5), checkpoint.fingerprint}
    tensors[diffusers_key(*EVERY[0], "up")][0, 0] += 1
    others.add(fingerprint(save(tensors, file)))
    assert len(others | {first}) == 5


def other_model(tensors):
    tensors["unet.down_blocks.7.attentions.0.proj_in.lora_A.weight"] = np.ones((2, 32), np.float32)


def dora(tensors):
    tensors["unet.mid_block.attentions.0.proj_in.dora_scale"] = np.ones((64, 1), np.float32)


def alone(tensors):
    del tensors[diffusers_key(*EVERY[0], "up")]


def another_rank(tensors):
    tensors[diffusers_key(*EVERY[0], "up")] = np.ones((64, 3), np.float32)


def another_width(tensors):
    tensors[diffusers_key(*EVERY[0], "up")] = np.ones((48, 2), np.float32)


def not_finite(tensors):
    tensors[diffusers_key(*EVERY[0], "up")][0, 0] = np.nan


def twice(tensors):
    tensors[kohya_key(*EVERY[0], "up")] = tensors[diffusers_key(*EVERY[0], "up")]


def integers(tensors):
    tensors[diffusers_key(*EVERY[0], "up")] = np.ones((64, 2), np.int32)


def strange_alpha(tensors):
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] = np.ones(
        2, np.float32
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (other_model, r"does not fit tiny: 1 of its 9 keys .*nearest to unet\.down_blocks\.1\.att"),
        (dora, r"is a DoRA \(unet\.mid_block\.attentions\.0\.proj_in\.dora_scale\)"),
        (alone, "lacks its other half"),
        (another_rank, "differ in rank"),
        (another_width, r"make \[48, 64\], but \[64, 64\] is needed"),
        (not_finite, r"to_q\.lora_B\.weight is not finite"),
        (twice, "are for one layer"),
        (integers, "is stored as I32"),
        (strange_alpha, r"the alpha of mid_block\..*to_q\.weight is not a number"),
        (dict.clear, "it is empty"),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_a_lora_that_does_not_fit_gives_a_one_line_error(
    tiny_checkpoint, tmp_path, tensors, break_it, message
):
    break_it(tensors)
    file = save(tensors, tmp_path / "heart.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        open_ensemble(tiny_checkpoint, lora=[str(file)])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{}/heart.bin", "must be FILE.safetensors"),
        ("{}/heart.safetensors", "no such file"),
        ("{}", "is a directory with 4 .safetensors files; name one file"),
        ("{}/empty:0.5", "is a directory with 0 .safetensors files"),
        ("{}/text.safetensors", "is not a safetensors file"),
        ("{}/good.safetensors:much", r"the weight must be a number .* not 'much'"),
        ("{}/good.safetensors:nan", r"the weight must be a number .* not 'nan'"),
        ("{}/peft.safetensors", r"adapter_config\.json is missing"),
        ("{}/metadata.safetensors", "its lora_adapter_metadata is not a JSON object"),
    ],
)
def test_the_command_rejects_bad_loras_before_it_writes(
    checkpoint, tiny_checkpoint, tmp_path, tensors, capsys, lora, message
):
    save(tensors, tmp_path / "good.safetensors")
    save(tensors, tmp_path / "metadata.safetensors", lora_adapter_metadata="[")
    save(stored(checkpoint, peft_key), tmp_path / "peft.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("a heart\n")
    job = ["--manifest", f"{tmp_path}/prompts.txt", "--output", f"{tmp_path}/out"]
    options = ["--model", str(tiny_checkpoint), "--lora", lora.format(tmp_path)]
    assert cli.main(["generate", *job, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_a_directory_works_like_the_only_file_in_it(tiny_checkpoint, tmp_path, tensors):
    file = save(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    for weight in ("", ":0.5"):
        loras = [f"{where}{weight}" for where in (file, tmp_path)]
        one, other = (open_ensemble(tiny_checkpoint, lora=[lora]) for lora in loras)
        assert one.fingerprint == other.fingerprint


def test_a_job_records_its_loras_and_continues_with_no_others(
    checkpoint, tiny_checkpoint, tmp_path, tensors, capsys
):
    file = save(tensors, tmp_path / "heart.safetensors")
    (tmp_path / "prompts.txt").write_text("a heart\n")
    job = [
        *("generate", "--manifest", f"{tmp_path}/prompts.txt", "--output", f"{tmp_path}/out"),
        *("--model", str(tiny_checkpoint), "--steps", "2", "--format", "imagefolder"),
    ]
    loras = ["--lora", f"{file}:0.5", "--lora", str(file)]
    assert cli.main([*job, *loras]) == 0
    (record,) = (tmp_path / "out").rglob("metadata.jsonl")
    record = json.loads(record.read_text())
    assert record["options"] == "lora=heart:0.5, lora=heart:1"
    assert "tiny + heart:0.5 + heart:1" in (tmp_path / "out" / "README.md").read_text()
    model = jaxdiff.load(tiny_checkpoint, lora=loras[1::2])
    assert record["model"] == model.ensemble.fingerprint
    (image,) = model.generate([jaxdiff.Request(prompt="a heart", seed=record["seed"], steps=2)])
    assert pixel_sha256(image.pixels) == record["pixel_sha256"]
    tensors[diffusers_key(*EVERY[0], "up")] *= 2
    save(tensors, file)
    capsys.readouterr()
    assert cli.main([*job, *loras]) == 2
    assert "holds another run (model" in capsys.readouterr().err
