"""Damaged checkpoints: whatever their files contain, one clear line or a model that can be loaded.

A seed decides which checkpoint is damaged, in which files, and how. To repeat a failure, run the
seed in the test's name.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizer

from jaxdiff.checkpoint import lora
from jaxdiff.engine.engine import TextToImage
from jaxdiff.errors import InputError
from jaxdiff.families import inspect, open_checkpoint
from jaxdiff.families.opening import open_ensemble
from jaxdiff.request import Options

MOST_CHARACTERS = 1500  # of a message: paths, and a few values
STEM = "diffusion_pytorch_model"
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
NUMBERS = [0, 1, -1, 3, 1000, 2**31, 2**63, 10**40, -(10**40), 0.5, 1e308, 1e-308]
NUMBERS += [float("inf"), float("nan")]
TEXTS = ["", "a", "5", "\x1b[2J\n", "é\ud800", "../../etc/passwd", "x" * 3000]
LISTS = [[], [None], [1, 2], [[1]], ["a"], [{}], [10**40] * 3, [1] * 10**4, DEEP]
VALUES = [None, True, False, *NUMBERS, *TEXTS, *LISTS, {}, {"a": 1}, {"content": "a"}, {"a": DEEP}]
PIECES = [b"", b"\0", b"\xff", b'"', b",", b"NaN", b"1e999", b"9" * 5000, b"[" * 5000]
KEYS = ["eos_token", "mask_token", "vocab", "added_tokens", "padding_side", "model_max_length"]
KEYS += ["x", "_x", "__metadata__", "num_hidden_layers", "_defaults"]


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """Yields the paths of some of the values in a parsed JSON file, but not its own, ()."""
    if path:
        yield path
    if isinstance(value, dict | list):
        keys = list(value)[:60] if isinstance(value, dict) else range(min(len(value), 6))
        for key in keys:
            yield from places(value[key], (*path, key))


def any_value(chance: random.Random):
    return copy.deepcopy(chance.choice(VALUES))


def changed(chance: random.Random, value):
    """Changes one value in a parsed JSON file: its kind, its size, its place; or removes it."""
    found, how = list(places(value)), chance.randrange(7)
    if not found or how == 0:
        return {**value, chance.choice(KEYS): any_value(chance)}
    *path, key = chance.choice(found)
    inner = value
    for each in path:
        inner = inner[each]
    old = copy.deepcopy(inner[key])
    if how == 1:
        del inner[key]
    elif how == 2 and isinstance(inner, dict):
        inner[chance.choice(list(inner))] = old
    elif how == 3 and type(old) in (int, float):
        inner[key] = chance.choice([old + 1, old - 1, -old, 2 * old, 10**6 * old, old / 3])
    elif how == 4 and isinstance(old, list):
        inner[key] = old * chance.choice([0, 2, 3])
    else:
        inner[key] = any_value(chance)
    return value


def with_changed_json(chance: random.Random, content: bytes) -> bytes:
    value = json.loads(content)
    for _ in range(chance.choice([1, 1, 2])):
        value = changed(chance, value)
    return json.dumps(value).encode()


def with_changed_header(chance: random.Random, content: bytes) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = with_changed_json(chance, content[8:end])
    return len(header).to_bytes(8, "little") + header + content[end:]


def with_changed_bytes(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content))
    inserted = chance.choice(PIECES)
    after = chance.choice([at, at + 1, at + 20, len(content)])
    return content[:at] + inserted + content[after:]


def replace_by_no_file(chance: random.Random, path: Path) -> None:
    path.unlink()
    how: list[Callable] = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]
    how += [lambda path: path.symlink_to(path.name), lambda path: None]
    chance.choice(how)(path)


def damage(chance: random.Random, folder: Path) -> list[str]:
    """Damages one or two files; returns their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix != ".safetensors"]
    damaged = {chance.choice(chance.choice([files, small])) for _ in range(chance.choice([1, 2]))}
    for path in sorted(damaged):
        if chance.random() < 0.06:
            replace_by_no_file(chance, path)
            continue
        change = {".json": with_changed_json, ".safetensors": with_changed_header}.get(path.suffix)
        if change is None or chance.random() < 0.1:
            change = with_changed_bytes
        path.write_bytes(change(chance, path.read_bytes()))
    return [path.relative_to(folder).as_posix() for path in sorted(damaged)]


@pytest.fixture(scope="module")
def originals(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Returns sound checkpoints by kind; "lora" is a folder of LoRAs for `tiny_checkpoint`."""
    folder = tmp_path_factory.mktemp("originals")
    full = Path(shutil.copytree(tiny_checkpoint, folder / "full"))
    CLIPTokenizer.from_pretrained(full / "tokenizer").save_pretrained(full / "tokenizer")
    sharded = Path(shutil.copytree(tiny_checkpoint, folder / "sharded"))
    shard(sharded / "unet" / f"{STEM}.safetensors")
    shape = load_file(tiny_checkpoint / "unet" / f"{STEM}.safetensors")[f"{LAYER}.weight"].shape
    loras = folder / "lora"
    loras.mkdir()
    down, up = np.ones((2, shape[1]), np.float32), np.ones((shape[0], 2), np.float32)
    config = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 3}, "use_rslora": False}
    (loras / "adapter_config.json").write_text(json.dumps(config))
    inside = json.dumps({f"unet.{key}": value for key, value in config.items()})
    for name, layer, metadata in (
        ("diffusers", f"unet.{LAYER}", {"lora_adapter_metadata": inside}),
        ("peft", f"base_model.model.{LAYER}", None),
    ):
        tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        save_file(tensors, loras / f"{name}.safetensors", metadata)
    kohya = f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
    tensors[f"{kohya}.alpha"] = np.array(2, np.float32)
    save_file(tensors, loras / "kohya.safetensors")
    return {"plain": tiny_checkpoint, "full": full, "sharded": sharded, "lora": loras}


def shard(path: Path) -> None:
    tensors, where = load_file(path), {}
    for number, part in enumerate(np.array_split(sorted(tensors), 2), start=1):
        name = f"{STEM}-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in map(str, part)}, path.with_name(name))
        where |= dict.fromkeys(map(str, part), name)
    path.unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    path.with_name(f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def listing(folder: Path) -> list[tuple]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def use(kind: str, folder: Path, base: Path) -> str:
    """Inspects a checkpoint, and loads it if it is said to be usable; or reads LoRAs."""
    if kind == "lora":
        for path in sorted(folder.glob("*.safetensors")):
            adapted = lora.adapted(open_checkpoint(base), [str(path)])
            assert adapted.weights("unet")[f"{LAYER}.weight"].read().dtype == np.float32
        return "usable"
    report = inspect.report(open_checkpoint(folder)).splitlines()
    assert all(line.isprintable() and len(line) <= MOST_CHARACTERS for line in report)
    if report[-1].split()[1:] != ["yes"]:
        return "unusable"
    model = open_ensemble_or_fail(folder)
    model.load_weights()
    return "usable"


def open_ensemble_or_fail(folder: Path) -> TextToImage:
    try:
        return TextToImage(open_ensemble(folder), Options())
    except InputError as problem:
        raise AssertionError(f"usable, but {problem}") from problem


def try_seeds(seeds: range, originals: dict[str, Path], folder: Path) -> dict[str, int]:
    """Damages a checkpoint for each seed; returns how many were usable, unusable and refused."""
    counts = {"usable": 0, "unusable": 0, "refused": 0}
    for seed in seeds:
        chance = random.Random(seed)
        kind = chance.choice(list(originals))
        copied = Path(shutil.copytree(originals[kind], folder / f"{seed}"))
        where = f"seed {seed}: {kind}: {damage(chance, copied)}"
        before = listing(copied)
        said = ""
        try:
            counts[use(kind, copied, originals["plain"])] += 1
        except InputError as refusal:
            counts["refused"] += 1
            said = str(refusal)
        except Exception as bug:
            bug.add_note(where)
            raise
        assert "\n" not in said, where
        assert len(said) <= MOST_CHARACTERS, where
        assert listing(copied) == before, where
        shutil.rmtree(copied)
    return counts


@pytest.mark.parametrize("start", [0, 20, 40, 60])
def test_a_damaged_checkpoint_is_one_line_or_a_model(originals, tmp_path, start):
    counts = try_seeds(range(start, start + 20), originals, tmp_path)
    assert all(counts.values()), counts


@pytest.mark.slow
def test_many_damaged_checkpoints_are_one_line_or_a_model(originals, tmp_path):
    assert all(try_seeds(range(1000, 1100), originals, tmp_path).values())
