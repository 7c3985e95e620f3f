from pathlib import Path

import pytest
from captioned import WRITERS


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> dict[str, Path]:
    """The same images in each form: its folder, which tests only read."""
    folders = {}
    for name, write in WRITERS.items():
        folders[name] = tmp_path_factory.mktemp("stored") / name
        write(folders[name])
    return folders
