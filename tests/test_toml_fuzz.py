"""Damaged job files and recipes are refused on one line, and nothing is written."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxdiff.errors import InputError
from jaxdiff.training import recipe
from pipelines import generate_options

ROOT = Path(__file__).parents[1]
JOB = b"""\
manifest = "prompts.txt"
output = "out"
steps = 30
lora = ["a.safetensors:0.5", "b.safetensors"]
strict = true
scheduler = "use_karras_sigmas=true"
profile = "traces"
"""
RECIPES = [path.read_bytes() for path in sorted((ROOT / "configs" / "train").glob("*.toml"))]
INSERTS = (
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\x85", b"\\", b'"', b'"""'),
    *(b"[" * 5000, b"9" * 5000, b"-1", b"0", b"1e999", b"-inf", b"nan", b"1979-05-27", b"07:32:00"),
    *(b"true", b"[]", b"[true]", b"{}", b"{a = 1}", b"#", b"=", b"x = 1\n", b"a.b.c = 1\n"),
    *(b"[[steps]]\n", b"[model]\n", b"steps = {a = 1}\n", b"9223372036854775808", b"1e40"),
)


def read_job(path: Path) -> None:
    generate_options.parse([str(path)])


@pytest.mark.parametrize(
    ("read", "originals"), [(read_job, [JOB]), (recipe.read, RECIPES)], ids=["job", "recipe"]
)
def test_a_damaged_file_is_read_or_refused(tmp_path, read, originals):
    refused = fuzz(tmp_path, read, originals, range(1000))
    assert 300 < refused < 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "originals"), [(read_job, [JOB]), (recipe.read, RECIPES)], ids=["job", "recipe"]
)
def test_many_more_damaged_files(tmp_path, read, originals):
    assert fuzz(tmp_path, read, originals, range(10_000, 30_000)) > 6000


def fuzz(folder: Path, read: Callable, originals: list[bytes], seeds: range) -> int:
    """Returns how many files were refused; any error but InputError names its seed."""
    path, refused = folder / "file.toml", 0
    for seed in seeds:
        picks = random.Random(seed)
        content = picks.choice(originals)
        for _ in range(picks.randint(1, 3)):
            start = picks.randint(0, len(content))
            end = min(len(content), start + picks.choice((0, 1, 5, 50)))
            content = content[:start] + picks.choice(INSERTS) + content[end:]
        path.write_bytes(content)
        try:
            read(path)
        except InputError as problem:
            refused += 1
            message = str(problem)
            if "\n" in message:
                raise AssertionError(f"seed {seed}: more than one line: {message}") from None
        except BaseException as problem:
            problem.add_note(f"the file of seed {seed}")
            raise
        assert [each.name for each in folder.iterdir()] == [path.name]
    return refused
