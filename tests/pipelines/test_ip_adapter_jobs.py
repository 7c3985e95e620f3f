"""Jobs whose prompts are images as well, by IP-Adapters."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from random_weights import random_params
from safetensors.numpy import save_file
from test_images_in import picture

from jaxdiff import cli
from jaxdiff.models.text.clip import CLIPImageEncoderConfig, CLIPVisionModelWithProjection
from jaxdiff.weights.save import save_params

pytestmark = pytest.mark.usefixtures("compiled_fast")

VECTOR, CONTEXT, WIDTHS = 24, 32, (64, 64, 64, 64)  # of the encoder, and of the tiny U-Net
ENCODER = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": VECTOR,
    "hidden_act": "gelu",
}


def write_adapter(folder: Path, seed: int, *, context: int = CONTEXT, widths=WIDTHS) -> Path:
    """Writes a plain adapter with random weights, as published, and its image encoder."""
    draw = np.random.default_rng(seed).normal
    shapes = {
        "image_proj.proj.weight": (4 * context, VECTOR),
        "image_proj.proj.bias": (4 * context,),
        "image_proj.norm.weight": (context,),
        "image_proj.norm.bias": (context,),
    }
    for place, width in enumerate(widths):
        for part in "kv":
            shapes[f"ip_adapter.{2 * place + 1}.to_{part}_ip.weight"] = (width, context)
    encoder = folder / "image_encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    tensors = {key: draw(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(tensors, folder / f"adapter{seed}.safetensors")
    (encoder / "config.json").write_text(json.dumps(ENCODER))
    read = CLIPImageEncoderConfig.from_json(ENCODER)
    params = random_params(CLIPVisionModelWithProjection, read, 0)
    save_params(params, encoder / "model.safetensors", "float32")
    return folder / f"adapter{seed}.safetensors"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_checkpoint) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder, seed) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def pictures(tmp_path) -> None:
    """Writes the pictures that rows name."""
    for name in ("a", "b"):
        picture(ord(name), (90, 70)).save(tmp_path / f"{name}.png")


def records(output: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(output / "metadata").to_pylist()}


@pytest.mark.slow  # test_controlnet_jobs.py has the quick one
def test_order_batches_and_neighbors_change_nothing(generate, adapters, tmp_path):
    rows = [
        {"id": f"{name}{scale}", "ip_adapter_image": f"{name}.png", "ip_adapter_scale": scale}
        for name in ("a", "b")
        for scale in (0, 0.5, 2.0)
    ]
    rows = [{**row, "seed": 1, "guidance_scale": 3} for row in rows]
    assert generate(rows, f"--ip-adapter={adapters[0]}") == 0
    other = [rows[i] for i in (5, 0, 4, 1)]
    options = ("--images-per-shard=3", "--batch-size=3")
    assert generate(other, f"--ip-adapter={adapters[0]}", *options, output="other") == 0
    first, second = records(tmp_path / "out"), records(tmp_path / "other")
    assert len({row["pixel_sha256"] for row in first.values()}) == 5  # at 0, none is seen
    for name, row in second.items():
        assert row["pixel_sha256"] == first[name]["pixel_sha256"]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("noisy")
def test_records_name_every_image_prompt_and_scale(generate, adapters, tmp_path):
    row = {"id": "x", "ip_adapter_image": ["a.png", "b.png"]}
    assert generate([row], f"--ip-adapter={adapters[0]}:0.5", f"--ip-adapter={adapters[1]}") == 0
    found = records(tmp_path / "out")["x"]
    assert found["ip_adapter_image"] == '["a.png", "b.png"]'
    assert found["ip_adapter_scale"] == "[0.5, 1.0]"
    assert len({*json.loads(found["ip_adapter_image_sha256"])}) == 2
    assert "ip_adapter=adapter1:0.5, ip_adapter=adapter2:1" in found["options"]
    assert cli.main(["view", str(tmp_path / "out")]) == 0
    (shown,) = (tmp_path / "out" / "gallery").glob("files-*")
    assert len([*shown.glob("prompts-*/000000/*.webp")]) == 2


@pytest.mark.usefixtures("noisy")
def test_a_row_without_an_image_prompt_is_rejected(generate, adapters, tmp_path):
    rows = [{}, {"ip_adapter_image": "a.png"}]
    assert generate(rows, f"--ip-adapter={adapters[0]}") == 0
    (said,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(said)["reason"] == "the job has --ip-adapter: give the row ip_adapter_image"


def test_an_adapter_for_another_model_is_refused(generate, tmp_path, capsys):
    row = {"ip_adapter_image": "a.png"}
    adapter = write_adapter(tmp_path / "other", 1, context=48)
    assert generate([row], f"--ip-adapter={adapter}") == 2
    assert "is for models whose cross_attention_dim is 48, not 32" in capsys.readouterr().err
    adapter = write_adapter(tmp_path / "fewer", 1, widths=(64, 64))
    assert generate([row], f"--ip-adapter={adapter}", output="fewer-out") == 2
    assert "IP-Adapter's 2 attentions do not fit the 4 of this" in capsys.readouterr().err
