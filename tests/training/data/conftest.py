from pathlib import Path

import pytest
from captioned import WRITERS


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> dict[str, Path]:
    """Folders with the same images, one for each storage form; tests only read them."""
    folders = {}
    for name, write in WRITERS.items():
        folders[name] = tmp_path_factory.mktemp("stored") / name
        write(folders[name])
    return folders
