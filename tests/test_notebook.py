"""The notebook runs as it is written, in IPython, and without what Beam needs for notebooks."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-steps.ipynb"
LAST = """
import sys
assert "IPython" in sys.modules
assert not [name for name in sys.modules if name.startswith("apache_beam.runners.interactive")]
"""


def test_the_notebook_runs_as_written(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 4
    (tmp_path / "cells.ipy").write_text("\n".join([*code, LAST]), encoding="utf-8")
    run = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "cells.ipy"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")
    table = pq.read_table(tmp_path / "out" / "first-steps" / "metadata")
    assert table["status"].to_pylist() == ["made"] * 12
