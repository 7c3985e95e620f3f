"""Remote manifests, through a real Beam file system: local files under another URL scheme."""

import gzip
import io
import re
import sys
from pathlib import Path

import pytest
from apache_beam.io.localfilesystem import LocalFileSystem
from apache_beam.options.pipeline_options import PipelineOptions

from jaxdiff import cli
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError
from pipelines import inputs

SCHEME = "shelf"


class Shelf(LocalFileSystem):
    """Maps shelf://tmp/x to the local /tmp/x; Beam finds this class by its scheme."""

    @classmethod
    def scheme(cls):
        return SCHEME

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        folder = Path(_local(dir_or_prefix)).parent
        for path in [*folder.iterdir(), *folder.glob("*/*")]:
            if path.is_file() and _shelf(path).startswith(dir_or_prefix):
                yield self.metadata(_shelf(path))

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def exists(self, path):
        return Path(_local(path)).is_file()  # a bucket has no folders

    def metadata(self, path):
        found = super().metadata(_local(path))
        found.path = path
        return found

    def size(self, path):
        return super().size(_local(path))

    def open(self, path, *args, **kwargs):
        return super().open(_local(path), *args, **kwargs)


def _local(path: str) -> str:
    return path.replace(f"{SCHEME}://", "/")


def _shelf(path: str | Path) -> str:
    return f"{SCHEME}://{str(path).lstrip('/')}"


def fetched(where: str):
    return inputs.fetched(where, PipelineOptions())


@pytest.fixture
def shelf(tmp_path) -> str:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b.txt").write_text("two\n")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "one"}\n'))
    return _shelf(folder)


def prompts(manifest) -> list[str]:
    return [e.values["prompt"] for source in manifest.sources for e in manifests.read(source)]


def test_a_local_path_is_not_copied(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with fetched(str(tmp_path / "p.txt")) as manifest:
        assert manifest == manifests.find(tmp_path / "p.txt")


def test_a_url_is_copied_and_the_copy_is_deleted(shelf):
    with fetched(f"{shelf}/a.jsonl.gz") as manifest:
        (source,) = manifest.sources
        assert (manifest.name, source.name) == (f"{shelf}/a.jsonl.gz",) * 2
        assert prompts(manifest) == ["one"]
        assert source.path.exists()
    assert not source.path.exists()
    assert not source.path.parent.exists()


def test_the_files_of_a_url_glob_are_read_in_name_order(shelf):
    with fetched(f"{shelf}/*") as manifest:
        assert [source.name for source in manifest.sources] == [
            f"{shelf}/a.jsonl.gz",
            f"{shelf}/b.txt",
        ]
        assert prompts(manifest) == ["one", "two"]


@pytest.mark.parametrize("end", ["", "/"])
def test_the_url_of_a_folder_gives_one_prompt_per_text_file(shelf, end):
    with fetched(shelf + end) as manifest:
        (source,) = manifest.sources
        assert [entry.values for entry in manifests.read(source)] == [{"id": "b", "prompt": "two"}]


def test_a_manifest_has_the_same_digest_locally_and_remotely(shelf, tmp_path):
    for end in ("", "/*", "/b.txt"):
        with fetched(shelf + end) as there:
            here = manifests.find(f"{tmp_path}/prompts{end}")
            assert manifests.digest(there) == manifests.digest(here)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("/no.txt", "does not exist"),
        ("/*.csv", "matches no file"),
        ("/no/", "is a folder without .txt files"),
    ],
)
def test_a_url_without_files_is_a_one_line_error(shelf, where, message):
    with pytest.raises(InputError) as caught, fetched(shelf + where):
        pass
    assert str(caught.value).startswith(f"manifest {shelf}{where} {message}")


def test_a_url_exists_if_there_are_files(shelf):
    options = PipelineOptions()
    for there in ("", "/", "/b.txt", "/*.gz"):
        assert inputs.exists(shelf + there, options), there
    for missing in ("/no.txt", "/*.csv", "/no", "/no/"):
        assert not inputs.exists(shelf + missing, options), missing


def test_an_unreachable_url_is_an_error_even_if_missing_ones_are_skipped(capsys, tmp_path):
    arguments = ["generate", "--manifest=https://host/p.txt", f"--output={tmp_path / 'out'}"]
    assert cli.main([*arguments, "--if-missing=skip"]) == 2
    message = "jaxdiff: manifest https://host/p.txt cannot be read (Unable to get filesystem"
    assert capsys.readouterr().err.startswith(message)


def test_an_unreachable_url_is_a_one_line_error(capsys, tmp_path, monkeypatch):
    for module, _ in inputs.EXTRAS.values():  # as if not installed
        monkeypatch.setitem(sys.modules, module, None)
    said = {
        "gs://bucket/p.txt": "needs: pip install 'apache-beam[gcp]'",
        "s3://bucket/p.txt": "needs: pip install 'apache-beam[aws]'",
        "https://host/p.txt": "cannot be read (Unable to get filesystem",
    }
    for where, message in said.items():
        arguments = ["generate", f"--manifest={where}", f"--output={tmp_path / 'out'}"]
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"jaxdiff: manifest {where} {message}")
    assert not (tmp_path / "out").exists()


def test_prompts_work_like_a_text_file_and_can_be_extended(tmp_path, command, noisy, capsys):
    path, directory = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("a red circle\na star, {date}\n")
    _, manifest, *options = command(directory, manifest=path)
    assert manifest == f"--manifest={path}"
    prompts = ["--prompt", "a red circle", "--prompt=a star, {date}"]
    assert cli.main(["generate", *prompts, *options]) == 0
    for same in (prompts, [manifest]):
        capsys.readouterr()
        assert cli.main(["generate", *same, *options]) == 0
        assert "is already finished: 2 images" in capsys.readouterr().out
    assert cli.main(["generate", *prompts, "--prompt=a ring", *options]) == 0
    summary = capsys.readouterr().out
    assert re.search(r"^this run: 1 image on 1 x cpu: .*\nplan .* load .* finalize", summary)
    assert re.search(rf"\nall runs: 3 images in {directory} on 1 x cpu: .*\nload ", summary)
    assert cli.main(["verify", str(directory)]) == 0
    assert open_run(directory).plan.images == 3
    assert cli.main(["generate", "--prompt=a star", *options]) == 2
    said = capsys.readouterr().err
    assert "line 1 of manifest command-line.txt changes image 0 of row '0'" in said


@pytest.mark.parametrize(
    ("text", "name", "rows"),
    [
        ('\n {"prompt": "a", "seed": 1}\n', "stdin.jsonl", [{"prompt": "a", "seed": 1}]),
        ("seed,Prompt\n1,a\n", "stdin.csv", [{"seed": "1", "Prompt": "a"}]),
        ("prompt\tn\na, b\t1\n", "stdin.tsv", [{"prompt": "a, b", "n": "1"}]),
        ("a prompt, in oils\nprompt\n", "stdin.txt", ["a prompt, in oils", "prompt"]),
        ("\ufeffprompt\n", "stdin.txt", ["prompt"]),
    ],
)
def test_the_format_of_standard_input_is_known_by_its_beginning(monkeypatch, text, name, rows):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with fetched("-") as manifest:
        (source,) = manifest.sources
        assert manifest.name == source.name == name
        found = [entry.values for entry in manifests.read(source) if entry.values]
        assert found == [{"prompt": row} if isinstance(row, str) else row for row in rows]
    assert not source.path.exists()


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (gzip.compress(b"a\n", mtime=0), "standard input is not text; unpack it, or name its file"),
        ("a\n".encode("utf-16"), "standard input is not text"),
        (None, "there is no standard input; name a file"),
        (b"", "manifest stdin.txt has no rows"),
    ],
)
def test_unusable_standard_input_is_a_one_line_error(
    monkeypatch, tmp_path, command, capsys, stdin, message
):
    file = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
    monkeypatch.setattr(sys, "stdin", file)
    assert cli.main(command(tmp_path / "out", manifest="-")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("noisy")
def test_a_job_reads_its_prompts_from_a_url(shelf, command, tmp_path):
    directory = tmp_path / "out"
    assert cli.main(command(directory, manifest=f"{shelf}/*")) == 0
    assert cli.main(["verify", str(directory)]) == 0
