"""Scores of pictures, from their files' bytes."""

import io

import numpy as np
from PIL import Image

from jaxdiff.evaluation.records import Picture, Prompt
from jaxdiff.evaluation.scoring import Scoring, score_file
from jaxdiff.worlds import shapes


def test_transparency_changes_no_score(tmp_path):
    (row,) = shapes.benchmark_rows("single_object", 1, 0)
    scene, _ = shapes.sample(np.random.default_rng(0))
    pixels = shapes.render(scene)
    alpha = np.random.default_rng(1).integers(0, 256, (*pixels.shape[:2], 1), np.uint8)
    pictures = []
    for place, image in enumerate((pixels, np.concatenate([pixels, alpha], axis=-1))):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        prompt = Prompt(str(place), row["prompt"], row["tag"], row)
        pictures.append(Picture(str(place), prompt, 0, 0, file.getvalue(), "png"))
    table = score_file(pictures, Scoring(exact=True), tmp_path / "scores.parquet", "")
    plain, clear = table.drop_columns(["key", "id"]).to_pylist()
    assert plain == clear
