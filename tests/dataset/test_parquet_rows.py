"""Rows of Parquet bring images as bytes, as the Hub's datasets and our own have them."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdiff.dataset import planning
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble

HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(color: str | int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 8), color).save(file, "png")
    return file.getvalue()


def write(path: Path, row_group_size: int = 2, **columns) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def planned(tmp_path, tiny_checkpoint):
    """Plans a manifest; returns its images' requests and the reasons for rejected rows."""

    def planned(manifest: Path, image_root: Path | None = None, **said):
        opened = open_ensemble(tiny_checkpoint)
        settings = job_settings.resolve({"width": 16, "height": 8, **said}, opened)
        found = manifests.find(manifest)
        identity = planning.identify(found, settings, opened)
        folder = tmp_path / "plan"
        root = image_root and str(image_root)
        planning.make(found, settings, opened, identity, folder, models={}, image_root=root)
        (images,) = folder.glob("*.parquet")
        (rejected,) = folder.glob("rejected*")
        rows = pq.read_table(images).to_pylist()
        return rows, [json.loads(line)["reason"] for line in rejected.read_text().splitlines()]

    return planned


def test_rows_have_images_as_bytes_or_as_paths_or_none(planned, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "a.png").write_bytes(png("red"))
    paths = [None, "a.png", None, "none.png", "../a.png", None]
    contents = [png("blue"), None, None, None, None, b"no image"]
    images = [{"bytes": b, "path": p} for b, p in zip(contents, paths, strict=True)]
    path = write(
        tmp_path / "sets" / "rows.parquet",
        prompt=["a ring"] * 6,
        mask=pa.array([png(255, "L"), *[None] * 5], pa.large_binary()),
        **{"Init Image": pa.array([*images[:2], None, *images[3:]], HUB)},
    )
    rows, (missing, outside, bad) = planned(path)
    assert {row["line"]: (row["init_image"], row["mask_image"]) for row in rows} == {
        1: ("rows.parquet#Init Image/0", "rows.parquet#mask/0"),
        2: ("a.png", None),
        3: (None, None),
    }
    assert "image none.png does not exist in" in missing
    assert "image '../a.png' is not a path inside" in outside
    assert "image rows.parquet#Init Image/5 is not a readable image" in bad


def test_lists_are_read_image_by_image(tmp_path):
    image = png("blue")
    lists = [[{"bytes": image}, {"path": "a.png"}], [], None, [{"bytes": image}] * 9, [None]]
    path = write(
        tmp_path / "rows.parquet",
        prompt=["a ring"] * 5,
        control_image=pa.array(lists, pa.list_(HUB)),
        ip_adapter_image=[[image], [image, None], None, [], [image] * 2],
    )
    (source,) = manifests.find(path).sources
    entries = list(manifests.read(source))
    assert [entry.values and entry.values["control_image"] for entry in entries] == [
        *(["rows.parquet#control_image/0/0", "a.png"], None, None, None, [None])
    ]
    assert entries[3].error == "control_image has 9 images; at most 8 are used"
    assert [entry.values and entry.values["ip_adapter_image"] for entry in entries] == [
        ["rows.parquet#ip_adapter_image/0/0"],
        ["rows.parquet#ip_adapter_image/1/0", None],
        *(None, None),
        ["rows.parquet#ip_adapter_image/4/0", "rows.parquet#ip_adapter_image/4/1"],
    ]


def test_several_files_are_read_below_the_image_root(planned, tmp_path):
    for number in range(2):
        path = tmp_path / f"sets/{number}/rows.parquet"
        write(path, prompt=["a ring"], image=[png("red")], id=[str(number)])
    for root, start in ((None, ""), (tmp_path, "sets/")):
        rows, _ = planned(tmp_path / "sets/*/rows.parquet", root)
        found = [row["init_image"] for row in rows]
        assert found == [f"{start}{number}/rows.parquet#image/0" for number in range(2)]
        shutil.rmtree(tmp_path / "plan")


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        ("sets/rows.parquet", "other", "name its folder with --image-root"),
        ("sets/rows.parquet", "s3://bucket", "name its folder with --image-root"),
        ("other/rows.parquet", None, "or is a link to a place outside; move it there"),
        ("rows.parquet.gz", None, "has images; unpack it with gunzip"),
        ("lists.parquet", None, "column 'image' has lists of images; write it with one image in"),
    ],
)
def test_files_that_could_not_be_read_later_are_refused(planned, tmp_path, name, root, expected):
    path = write(tmp_path / "sets" / "rows.parquet", prompt=["a ring"], image=[png("red")])
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.parquet").symlink_to(path)
    write(tmp_path / "lists.parquet", prompt=["a ring"], image=[[png("red")]])
    with pytest.raises(InputError) as caught:
        planned(tmp_path / name, root if root and "://" in root else root and tmp_path / root)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_with_images_lies_on_this_machine(tmp_path):
    path = write(tmp_path / "copied", prompt=["a ring"], image=[png("red")])
    name = "gs://bucket/rows.parquet"
    (source,) = manifests.of_names(name, {name: path}).sources
    with pytest.raises(InputError, match="are read from this machine only; copy it here, and name"):
        list(manifests.read(source, root="gs://bucket"))


@pytest.mark.parametrize("said", [{}, {"prompt_column": "negative_prompt"}])
def test_a_dataset_of_ours_is_a_manifest(finished, planned, tmp_path, said):
    made = finished(format="parquet")
    first = {row["key"]: row for row in pq.read_table(made / "metadata").to_pylist()}
    shard = made / "data" / "train-00001.parquet"
    for manifest, count in ((made, 9), (shard, pq.ParquetFile(shard).metadata.num_rows)):
        rows, rejected = planned(manifest, **said)
        shutil.rmtree(tmp_path / "plan")
        assert len(rows) + len(rejected) == count
        for row in rows:
            before = first[row["id"]]
            assert row["init_image_sha256"] == before["sha256"]
            assert row["prompt"] == before[said.get("prompt_column", "prompt")]
            assert row["negative_prompt"] == ""  # the settings are those of the job
            record = json.loads(row["metadata"])["record"]
            assert {name: record[name] for name in ("id", "seed", "metadata")} == {
                name: before[name] for name in ("id", "seed", "metadata")
            }
    assert {row["init_image"].partition("#")[0] for row in rows} == {"train-00001.parquet"}


def test_the_named_prompt_column_is_found_in_archives_too(planned, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.png", png("red")), ("1.json", b'{"caption": "a ring"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (row,), _ = planned(tmp_path / "a.tar", prompt_column="caption")
    assert (row["prompt"], row["init_image"]) == ("a ring", "a.tar#1.png")


def test_planning_holds_a_few_row_groups_at_a_time(tmp_path, tiny_checkpoint):
    random = np.random.default_rng(0)
    path = tmp_path / "rows.parquet"
    schema = pa.schema([("prompt", pa.string()), ("image", pa.binary())])
    image = png("red")
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(64):  # what follows the end of a PNG is ignored
            images = [image + random.bytes(2**22) for _ in range(2)]
            writer.write_table(pa.table([["a ring"] * 2, images], schema))
    code = f"""
import sys
from pathlib import Path
import pyarrow as pa
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from making import make_plan
from jaxdiff.images import tables
tables._columns = tables._Recent(2**26)
print(make_plan(Path(sys.argv[3]), Path(sys.argv[1]), Path(sys.argv[2])).plan.images)
print(pa.default_memory_pool().max_memory())
"""
    command = [sys.executable, "-c", code, path, tiny_checkpoint, tmp_path / "out"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    images, most = map(int, said.split())
    assert images == 128
    assert most < 2**26 + 6 * 2**23  # what is remembered, and one more group being read
