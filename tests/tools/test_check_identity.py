"""tools/check_identity: what it compares, and its exit code."""

import json

import numpy as np

from tools import check_identity


def test_images_of_the_bundled_model_depend_on_their_requests_alone(tmp_path, monkeypatch, capsys):
    output, images = tmp_path / "identity.json", tmp_path / "identity.npz"
    before = tmp_path / "before.npz"
    np.savez(before, **{"float32 8": np.zeros((1, 64, 64, 3), np.uint8)})
    # The images of another process must be equal, too, so that a difference ends in exit code 1.
    monkeypatch.setattr(check_identity, "NOT_PROMISED", ("batch",))
    arguments = ["--model", "shapes64-4step", "--steps", "2"]
    arguments += ["--before", before, "--output", output, "--images", images]
    assert check_identity.main([*map(str, arguments)]) == 1
    rows = json.loads(output.read_text())["rows"]
    differ = {row["what"]: row["differ"] for row in rows}
    first = np.load(images)["float32 8"]
    assert differ.pop("process") == np.count_nonzero(first) > 0
    assert differ == dict.fromkeys(("text", "again", "slot", "neighbours", "padding"), 0)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_a_missing_model_gives_a_one_line_error(capsys):
    assert check_identity.main(["--model", "/nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
