"""A dozen small images with captions, in every supported storage form."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZES = [(16, 16), (16, 32), (40, 20)] * 4  # height, width


def picture(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    return random.integers(0, 256, (*SIZES[number], 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "png", **how) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **how)
    return file.getvalue()


def caption(number: int) -> str:
    return f"Bild {number} ☀"


def write_folder(folder: Path, rows: list[dict] | None = None) -> None:
    (folder / "pictures").mkdir(parents=True)
    for number in range(len(SIZES)):
        (folder / f"pictures/{number}.png").write_bytes(encoded(picture(number)))
    rows = rows or [
        {"file_name": f"pictures/{number}.png", "text": caption(number), "other": number}
        for number in range(len(SIZES))
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")


def write_csv(folder: Path) -> None:
    write_folder(folder)
    (folder / "metadata.jsonl").unlink()
    rows = [f'pictures/{number}.png,"{caption(number)}"\n' for number in range(len(SIZES))]
    (folder / "metadata.csv").write_text("".join(["file_name,caption\n", *rows]), "utf-8")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_webdataset(folder: Path) -> None:
    for shard in range(2):
        members = {}
        for number in range(6 * shard, 6 * shard + 6):
            entry = {"caption": caption(number), "other": [1]}
            members[f"./a.b/{number:04d}.json"] = json.dumps(entry).encode()
            members[f"./a.b/{number:04d}.PNG"] = encoded(picture(number))
            members[f"./a.b/{number:04d}.cls"] = b"7"
        write_tar(folder / f"{shard:05d}.tar", members)


def write_parquet(folder: Path, captions: list | None = None, column: str = "text") -> None:
    (folder / "data").mkdir(parents=True)
    cells = [{"bytes": encoded(picture(n)), "path": f"{n}.png"} for n in range(len(SIZES))]
    captions = captions or [caption(number) for number in range(len(SIZES))]
    table = pa.table({"label": list(range(len(SIZES))), "image": cells, column: captions})
    pq.write_table(table.slice(0, 7), folder / "data/train-00000-of-00002.parquet", 3)
    pq.write_table(table.slice(7), folder / "data/train-00001-of-00002.parquet", 3)
    pq.write_table(table.slice(0, 1), folder / "data/test-00000-of-00001.parquet")


WRITERS = {
    "imagefolder": write_folder,
    "csv": write_csv,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}
