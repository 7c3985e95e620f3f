import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import make_plan, make_shard
from PIL import Image

from jaxdiff import cli
from jaxdiff.dataset import formats, ledger
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.finished import gallery
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError

FORMATS = list(formats.FORMATS)


def read(index: Path) -> tuple[dict, list[dict], Path]:
    """Returns a gallery's job, its images' records and the folder of its files."""
    (folder,) = set(re.findall(r"files-\w+", index.read_text("utf-8")))
    data = index.parent / folder / "data"

    def argument(path: Path, function: str):
        text = path.read_text("ascii")
        assert text.startswith(f"gallery.{function}(")
        return json.loads(text[len(f"gallery.{function}(") : -len(");\n")])

    job = argument(data / "job.js", "open")
    chunks = sorted(path for path in data.iterdir() if path.name != "job.js")
    assert [path.name for path in chunks] == [f"{n:05d}.js" for n in range(job["chunks"])]
    rows = [row for path in chunks for row in argument(path, "add")]
    return job, [dict(zip(job["columns"], row, strict=True)) for row in rows], index.parent / folder


def many(tmp_path: Path, checkpoint: Path, name: str, count: int, **said) -> Path:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(f'{{"prompt": "number {n}"}}\n' for n in range(count)))
    run = make_plan(tmp_path / name, path, checkpoint, **said)
    for shard in run.shards:
        make_shard(run, shard)
    return tmp_path / name


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_gallery_contains_every_image_unchanged(finished, format_, image_format):
    directory = finished(format=format_, image_format=image_format)
    job, records, files = read(gallery.write(directory))
    assert (job["made"], job["failed"], job["planned"]) == (9, 0, 9)
    rows = pq.read_table(directory / "metadata").sort_by("key").to_pylist()
    assert sorted(records, key=lambda record: record["key"]) == [
        {name: row[name] for name in gallery.COLUMNS} for row in rows
    ]
    run = open_run(directory)
    read_samples = formats.FORMATS[format_].read
    for shard in run.shards:
        for sample in read_samples(directory / run.file_names(shard)[0]):
            path = f"images/000000/{sample.record['key']}.{job['extension']}"
            assert (files / path).read_bytes() == sample.image
    assert not (files / "thumbnails").exists()


@pytest.mark.parametrize("format_", FORMATS)
def test_a_dataset_with_a_gallery_still_verifies(finished, format_, capsys):
    directory = finished(format=format_)
    assert cli.main(["view", str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory}/gallery/index.html\n"
    assert ledger.verify(directory)[1] == []


def test_the_output_option_sets_the_folder_of_the_gallery(finished, tmp_path):
    directory = finished()
    assert cli.main(["view", str(directory), "--output", str(tmp_path / "a" / "b")]) == 0
    assert len(read(tmp_path / "a" / "b" / "index.html")[1]) == 9
    assert not (directory / "gallery").exists()


def test_failed_images_have_their_reason(finished):
    job, records, files = read(gallery.write(finished(failing=["000000002"])))
    assert (job["made"], job["failed"]) == (8, 1)
    assert {r["key"]: r["error"] for r in records if r["error"]} == {"000000002": "not finite"}
    assert not list(files.glob("images/*/000000002.*"))


def test_an_unfinished_dataset_shows_its_finished_shards(tmp_path, manifest, tiny_checkpoint):
    directory = tmp_path / "dataset"
    run = make_plan(directory, manifest, tiny_checkpoint, images_per_shard=4, batch_size=2)
    job, records, _ = read(gallery.write(directory))
    assert (job["planned"], job["made"], records) == (9, 0, [])
    make_shard(run, 1)
    job, records, _ = read(gallery.write(directory))
    assert (job["planned"], job["made"]) == (9, 4)
    assert [r["key"] for r in records] == [f"00000000{n}" for n in (4, 5, 6, 7)]


def test_only_larger_images_get_a_thumbnail(tmp_path, tiny_checkpoint):
    path = tmp_path / "sizes.jsonl"
    sizes = [(384, 384), (392, 16), (512, 1024)]
    lines = [json.dumps({"prompt": "x", "width": w, "height": h}) for w, h in sizes]
    path.write_text("\n".join(lines))
    for image_format in ("png", "jpeg"):
        directory = tmp_path / image_format
        run = make_plan(directory, path, tiny_checkpoint, image_format=image_format)
        for shard in range(3):
            make_shard(run, shard)
        _, _, files = read(gallery.write(directory))
        thumbnails = {}
        for path_ in (files / "thumbnails").rglob("*.webp"):
            with Image.open(path_) as image:
                thumbnails[path_.stem] = image.size
        assert thumbnails == {"000000001": (384, 16), "000000002": (192, 384)}


def test_the_command_has_the_options_that_determine_pixels(finished, tiny_checkpoint):
    assert read(gallery.write(finished("plain")))[0]["options"] == (
        f"--model={tiny_checkpoint} --noise=jax --dtype=float32 --batch-size=2"
    )
    said = {"noise": "torch", "eta": 0.5, "guidance_rescale": 0.7, "image_format": "webp"}
    said |= {"width": 64, "height": 64, "scheduler": "timestep_spacing=leading, steps_offset=1"}
    options = read(gallery.write(finished("special", **said)))[0]["options"]
    for option in (
        "--noise=torch",
        "--eta=0.5",
        "--guidance-rescale=0.7",
        "--image-format=webp",
        "'--scheduler=steps_offset=1, timestep_spacing=leading'",
    ):
        assert f" {option}" in options


@pytest.mark.parametrize(
    "value",
    ["\x03\ntouch x\n", "a\nb", "a\x1b[201~b", "a\rb", "a\x7fb", "a\x9bb", "a\u202eb", "a\udcffb"],
)
@pytest.mark.parametrize("name", ["model", "variant", "refiner", "lora"])
def test_options_with_control_characters_are_not_offered(finished, name, value):
    directory = finished()
    path = directory / "_jaxdiff" / "plan" / "plan.json"
    said = json.loads(path.read_text())
    said["models"][name] = ["a.safetensors", f"{value}.safetensors"] if name == "lora" else value
    path.write_text(json.dumps(said))
    job, *_ = read(gallery.write(directory))
    assert (job["options"], job["unprintable"]) == (None, f"--{name}")


def with_images(tmp_path: Path, checkpoint: Path) -> Path:
    """Makes a dataset of rows of 400x200 that begin with an image in four ways, and one without."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 400, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    mask = np.zeros((200, 400), np.uint8)
    mask[:, 200:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = {"prompt": "x", "image": "ramp.png"}
    rows = [
        {**image, "strength": 0.5, "width": 32, "height": 16},
        {**image, "mask_image": "mask.png", "width": 32, "height": 16},
        {**image, "outpaint": "8,0,8,0", "width": 32, "height": 16},
        {**image, "mask_image": "mask.png", "width": 800, "height": 400},
        {"prompt": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = make_plan(tmp_path / "out", tmp_path / "rows.jsonl", checkpoint, steps=4)
    for shard in run.shards:
        make_shard(run, shard, failing=["000000001"])
    return tmp_path / "out"


def test_what_images_begin_with_is_shown_in_their_size(tmp_path, tiny_checkpoint):
    job, records, files = read(gallery.write(with_images(tmp_path, tiny_checkpoint)))
    assert (job["made"], job["failed"]) == (4, 1)
    files_of = {int(r["key"]): r["source_files"] for r in records}
    both = ["sources", "masks"]
    assert files_of == {0: ["sources"], 1: both, 2: both, 3: both, 4: []}
    first, last = (next(r for r in records if r["key"] == f"00000000{n}") for n in (0, 4))
    assert (first["init_image"], first["strength"], first["mask_image"]) == ("ramp.png", 0.5, None)
    assert (last["init_image"], last["strength"], last["outpaint"]) == (None, None, None)
    pictures = {}
    for path in (*files.glob("sources/000000/*.webp"), *files.glob("masks/000000/*.webp")):
        with Image.open(path) as opened:
            pictures[path.parts[-3], int(path.stem)] = np.asarray(opened.convert("L"))
    assert len(pictures) == 7
    half, borders = np.arange(32) >= 16, (np.arange(32) < 8) | (np.arange(32) >= 24)
    np.testing.assert_array_equal(pictures["masks", 1], np.tile(half * np.uint8(255), (16, 1)))
    np.testing.assert_array_equal(pictures["masks", 2], np.tile(borders * np.uint8(255), (16, 1)))
    for key in range(3):
        assert pictures["sources", key].shape == (16, 32)
    assert pictures["sources", 3].shape == pictures["masks", 3].shape == (192, 384)


def test_images_that_are_gone_changed_or_remote_are_only_named(tmp_path, tiny_checkpoint):
    directory = with_images(tmp_path, tiny_checkpoint)
    Image.new("RGB", (400, 200), "red").save(tmp_path / "ramp.png")
    before = read(gallery.write(directory))[1]
    (tmp_path / "ramp.png").unlink()
    after = read(gallery.write(directory))[1]
    path = directory / "_jaxdiff" / "plan" / "plan.json"
    said = json.loads(path.read_text())
    for root in ("gs://bucket", "/nowhere"):
        path.write_text(json.dumps({**said, "image_root": root}))
        _, records, files = read(gallery.write(directory))
        assert records == before == after
        assert not any(r["source_files"] for r in records)
        assert {r["init_image"] for r in records} == {"ramp.png", None}
        assert not (files / "sources").exists()
    for root in ("memory://folder", "a\0b"):
        path.write_text(json.dumps({**said, "image_root": root}))
        with pytest.raises(InputError, match="it is damaged"):
            gallery.write(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 2**31 - 1),
        ("height", 0),
        ("outpaint", "junk"),
        ("init_image", "../rows.jsonl"),
        ("init_image_sha256", None),
    ],
)
def test_a_hostile_row_with_an_image_shows_none(tmp_path, tiny_checkpoint, name, value):
    directory = with_images(tmp_path, tiny_checkpoint)
    path = directory / "metadata" / "train-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0][name] = value
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    records = read(gallery.write(directory))[1]
    assert [r["source_files"] for r in records if r["key"] == rows[0]["key"]] == [[]]


def test_the_command_says_what_the_paths_of_images_are_relative_to(tmp_path, tiny_checkpoint):
    directory = with_images(tmp_path, tiny_checkpoint)
    assert f" --image-root={tmp_path}" in read(gallery.write(directory))[0]["options"]
    path = directory / "_jaxdiff" / "plan" / "plan.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "image_root": "a\u202eb"}))
    job = read(gallery.write(directory))[0]
    assert (job["options"], job["unprintable"]) == (None, "--image-root")


def test_options_of_every_script_are_offered(finished):
    directory = finished()
    path = directory / "_jaxdiff" / "plan" / "plan.json"
    said = json.loads(path.read_text())
    said["models"]["model"] = value = "it's $(a) `model` 模型 نموذج 🌟"
    path.write_text(json.dumps(said))
    job, *_ = read(gallery.write(directory))
    assert f"--model={value}" in shlex.split(job["options"])
    assert job["unprintable"] is None


def test_a_second_gallery_replaces_the_first(finished):
    directory = finished()
    index = gallery.write(directory)
    _, _, first = read(index)
    assert gallery.write(directory) == index
    _, _, second = read(index)
    assert first != second
    assert sorted(path.name for path in index.parent.iterdir()) == [second.name, "index.html"]


def test_a_gallery_that_cannot_be_written_keeps_the_old_one(finished):
    directory = finished()
    index = gallery.write(directory)
    before = read(index)
    path = next((directory / "data").iterdir())
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # in the first header, which has a checksum
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00000\.tar cannot be read") as caught:
        gallery.write(directory)
    assert str(caught.value).count("\n") == 0
    assert f"jaxdiff verify {directory}" in str(caught.value)
    assert read(index) == before
    assert len(list(index.parent.iterdir())) == 2


def test_a_reader_never_sees_half_a_gallery(tmp_path, tiny_checkpoint):
    directory = many(tmp_path, tiny_checkpoint, "many", 1500)
    target = directory / "gallery"
    for part in (0, 3, 5):  # killed at the beginning, in the middle, near the end
        command = [sys.executable, "-m", "jaxdiff", "view", str(directory)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        old = set(target.glob("files-*"))
        while process.poll() is None:
            new = [f for f in target.glob("files-*") if f not in old]
            if new and len(list(new[0].glob("data/*.js"))) > part // 2:
                time.sleep(part % 2 * 0.05)
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
        if (target / "index.html").exists():
            assert len(read(target / "index.html")[1]) == 1500
    assert len(read(gallery.write(directory))[1]) == 1500
    assert len(list(target.iterdir())) == 2  # the killed processes have left no files


def test_other_folders_are_never_replaced(finished, tmp_path):
    directory = finished()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("<p>my own page")
    (tmp_path / "file").write_text("x")
    for target, message in (
        (tmp_path / "mine", "mine holds other files; name a new folder with --output"),
        (tmp_path / "file", "file is a file; name a folder with --output"),
        (directory, "holds other files"),
    ):
        with pytest.raises(InputError, match=message):
            gallery.write(directory, target)
    assert (tmp_path / "mine" / "index.html").read_text() == "<p>my own page"
    (directory / "gallery").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="gallery is a symbolic link"):
        gallery.write(directory)


def test_a_folder_without_a_run_stays_unchanged(tmp_path, capsys):
    assert cli.main(["view", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"jaxdiff: {tmp_path} holds no jaxdiff run\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", "../../../../evil", "an invalid key"),
        ("key", "/tmp/evil", "an invalid key"),
        ("metadata", '{"a": NaN}', "NaN is not JSON"),
        ("metadata", "[1]", "metadata that is not a JSON object"),
        ("metadata", "[" * 100_000, "cannot be read"),
        ("prompt", None, "a row with missing values"),
        ("width", None, "a row with missing values"),
        ("sha256", "0" * 64, "image 000000000 has changed"),
    ],
)
def test_a_hostile_record_is_rejected_and_nothing_is_written(finished, name, value, message):
    directory = finished()
    path = directory / "metadata" / "train-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0][name] = value
    pq.write_table(pa.Table.from_pylist(rows, shards.METADATA_SCHEMA), path)
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(InputError, match=message):
        gallery.write(directory)
    assert sorted(directory.parent.rglob("*")) == before


def test_memory_does_not_grow_with_the_images(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(gallery, "CHUNK_IMAGES", 125)  # fewer than usual, as the shards'
    said, peaks = {"image_format": "jpeg", "images_per_shard": 250}, []
    for count in (250, 1000):
        directory = many(tmp_path, tiny_checkpoint, str(count), count, **said)
        tracemalloc.start()
        gallery.write(directory)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_gallery_needs_no_jax():
    code = (
        "import sys, jaxdiff.dataset.finished.gallery; "
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
