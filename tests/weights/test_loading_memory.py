"""Loading a full-size model needs little more memory than the weights themselves."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_loading_takes_at_most_a_quarter_and_a_gigabyte_more_than_the_weights(stored, tmp_path):
    command = [sys.executable, "-m", "tools.measure_loading", "--stored", stored]
    command += ["--directory", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
