"""The progress that a job prints."""

import re

import pytest
from injected import in_noise_at

from jaxdiff import cli
from jaxdiff.dataset import names
from jaxdiff.dataset.run import open_run
from pipelines import progress


@pytest.fixture
def finished(noise):
    return noise


def test_progress_is_reported_within_a_shard(tmp_path, command, capsys, monkeypatch, noisy):
    noisy(in_noise_at("", "import time; time.sleep(0.05)"))  # so that there is time to report
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    assert cli.main(command(tmp_path / "out", "--num-images=80", "--images-per-shard=200")) == 0
    lines = capsys.readouterr().err.splitlines()
    matches = [
        re.fullmatch(r"jaxdiff: (\d+)/103 images(, [\d.]+ images/s, [\d:]+ left)?", line)
        for line in lines
    ]
    counts = [int(match[1]) for match in matches if match]
    assert counts == sorted(counts)
    assert any(0 < count < 103 for count in counts)
    assert any(match[2] for match in matches if match)


def test_progress_ignores_files_with_odd_names(tmp_path, finish):
    directory = tmp_path / "out"
    finish(directory)
    counter = progress.Counter(open_run(directory))
    (directory / names.TMP).mkdir()
    for name in (f"{names.DONE}/x.json", f"{names.DONE}/99999.json", f"{names.TMP}/x.progress"):
        (directory / name).write_text("")
    assert counter.count() == 24
