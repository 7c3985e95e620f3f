"""Checkpoints from the Hub, online and from its cache on disk; and single files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
from original import SD1, XL, shapes
from safetensors.numpy import save_file

from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A separate cache directory for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxdiff" / "models"


def refusal(model: str, variant: str | None = None) -> str:
    """Returns the one-line error of opening a model."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(model, variant)
    message = str(caught.value)
    assert "\n" not in message
    return message


def in_a_new_process(code: str, hub_cache: Path, **environment) -> str:
    """Returns the output of code in a process whose huggingface_hub cache is `hub_cache`.

    A new process is necessary because huggingface_hub reads the environment when it is imported.
    """
    program = (
        "from jaxdiff.families import open_checkpoint\n"
        "from jaxdiff.errors import InputError\n"
        "try:\n"
        f"    {code}\n"
        "except InputError as error:\n"
        "    print('InputError:', error)\n"
    )
    # Nothing answers there, and the refusal is immediate on any machine.
    nowhere = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | nowhere | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub_cache(tiny_checkpoint, tmp_path) -> Path:
    """A cache in huggingface_hub's format: blobs, and a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(tiny_checkpoint.rglob("*.*"))):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copyfile(path, blob)
        link = repository / "snapshots" / COMMIT / path.relative_to(tiny_checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return tmp_path / "hub"


PRINT = "opened = open_checkpoint({!r}); print(opened.name, opened.fingerprint)"


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("model", ["someone/tiny", f"someone/tiny@{COMMIT}"])
def test_a_hub_id_in_the_cache_is_opened_without_a_network(
    hub_cache, tiny_checkpoint, model, offline
):
    output = in_a_new_process(PRINT.format(model), hub_cache, HF_HUB_OFFLINE=offline)
    assert output == f"{model} {open_checkpoint(tiny_checkpoint).fingerprint}"


def test_a_hub_id_that_is_not_in_the_cache_gives_a_one_line_error(hub_cache):
    for model in ("someone/else", "someone/tiny@v2"):
        output = in_a_new_process(PRINT.format(model), hub_cache)
        assert output.startswith(f"InputError: model {model!r} is neither a local path nor in")
        assert "the Hub cannot be reached" in output
        output = in_a_new_process(PRINT.format(model), hub_cache, HF_HUB_OFFLINE="1")
        assert repr(model) in output
        assert "HF_HUB_OFFLINE" in output


def test_an_incomplete_snapshot_gives_a_one_line_error(hub_cache):
    path = hub_cache / "models--someone--tiny" / "snapshots" / COMMIT / UNET
    path.unlink()
    output = in_a_new_process(PRINT.format("someone/tiny"), hub_cache, HF_HUB_OFFLINE="1")
    assert output.startswith(f"InputError: {path} is missing")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that downloads use, with the files in `root`."""

    root: Path
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        path = self.path.partition("?")[0]
        files = {str(path.relative_to(self.root)): path for path in self.root.rglob("*.*")}
        if not path.startswith(("/someone/tiny/", "/api/models/someone/tiny")):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": name_of(file)}
                for name, file in files.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            self.asked.append(name)
            etag = {"ETag": f'"{name_of(files[name])}"', "X-Repo-Commit": COMMIT}
            self.answer(200, files[name].read_bytes(), etag)

    do_GET = do_HEAD

    def answer(self, status: int, body: bytes, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def name_of(file: Path) -> str:
    """Returns a hash of a file's contents, in place of git's."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tiny_checkpoint, tmp_path):
    """The address of a Hub with the tiny checkpoint in float32 and float16, and a pickle."""
    Hub.root = Path(shutil.copytree(tiny_checkpoint, tmp_path / "remote"))
    shutil.copy(Hub.root / UNET, (Hub.root / UNET).with_suffix(".fp16.safetensors"))
    (Hub.root / UNET).with_suffix(".bin").write_bytes(b"pickle")
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_only_the_needed_files_are_downloaded_from_the_hub_and_once(hub, tiny_checkpoint, tmp_path):
    expected = f"someone/tiny {open_checkpoint(tiny_checkpoint).fingerprint}"
    print_it = PRINT.format("someone/tiny")
    assert in_a_new_process(print_it, tmp_path / "hub", HF_ENDPOINT=hub) == expected
    needed = {str(path.relative_to(tiny_checkpoint)) for path in tiny_checkpoint.rglob("*.*")}
    assert set(Hub.asked) == needed
    Hub.asked.clear()
    assert in_a_new_process(print_it, tmp_path / "hub", HF_ENDPOINT=hub) == expected
    assert Hub.asked == []
    assert in_a_new_process(print_it, tmp_path / "hub", HF_HUB_OFFLINE="1") == expected


def test_a_variant_is_downloaded_alone(hub, tmp_path):
    code = "print(open_checkpoint('someone/tiny', 'fp16').defaults.name)"
    assert in_a_new_process(code, tmp_path / "hub", HF_ENDPOINT=hub) == "Stable Diffusion 1"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in Hub.asked
    assert UNET not in Hub.asked


def test_a_model_that_the_hub_lacks_gives_a_one_line_error(hub, tmp_path):
    output = in_a_new_process(PRINT.format("someone/else"), tmp_path / "hub", HF_ENDPOINT=hub)
    assert output.startswith("InputError: model 'someone/else'")
    assert "the Hub has no public model of this name" in output
    (Hub.root / UNET).unlink()
    (Hub.root / UNET).with_suffix(".fp16.safetensors").unlink()
    output = in_a_new_process(PRINT.format("someone/tiny"), tmp_path / "hub", HF_ENDPOINT=hub)
    assert output.startswith("InputError: someone/tiny/unet contains diffusion_pytorch_model.bin")


def test_the_error_for_a_repository_of_single_files_lists_them(hub, tmp_path):
    (Hub.root / "model_index.json").unlink()
    shutil.copy(Hub.root / UNET, Hub.root / "merged.safetensors")
    output = in_a_new_process(PRINT.format("someone/tiny"), tmp_path / "hub", HF_ENDPOINT=hub)
    assert "contains no model_index.json, so it is not a diffusers repository" in output
    assert "merged.safetensors" in output


def test_a_full_disk_is_not_reported_as_a_network_error(hub, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
    code = limit + PRINT.format("someone/tiny")
    output = in_a_new_process(code, tmp_path / "hub", HF_ENDPOINT=hub)
    assert "cannot be written to the Hugging Face cache" in output
    assert "File too large" in output


def test_a_directory_takes_precedence_over_a_hub_id_of_its_name(
    tiny_checkpoint, tmp_path, monkeypatch
):
    shutil.copytree(tiny_checkpoint, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    opened = open_checkpoint("someone/tiny")
    assert opened.path == Path("someone/tiny")
    assert opened.name == "tiny"


def test_an_invalid_hub_id_is_not_looked_up(tmp_path):
    for model in ("no-such-model", str(tmp_path / "a/b"), "./a/b", "a/b/c", "a//b"):
        assert "neither a diffusers directory" in refusal(model)
    assert "neither a local path nor a Hub id" in refusal("some..one/tiny")


@pytest.fixture
def single(tmp_path):
    """A function that writes a single file of a family with all keys and almost no data."""

    def single(width: int) -> Path:
        path = tmp_path / "download.safetensors"
        save_file({key: np.zeros(shape, np.float16) for key, shape in shapes(width).items()}, path)
        return path

    return single


def test_a_single_file_opens_like_a_directory(single, tiny_checkpoint):
    path = single(XL)
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_checkpoint / "tokenizer", path.parent / folder)
    opened = open_checkpoint(path)
    assert (opened.name, opened.path) == ("download", path)
    assert opened.defaults.name == "Stable Diffusion XL"
    assert opened.networks == ("text_encoder", "text_encoder_2", "unet", "vae")
    assert opened.tokenizer("text_encoder_2") == path.parent / "tokenizer_2"
    assert (opened.defaults.size, opened.defaults.size_multiple) == ((1024, 1024), 8)
    assert (opened.defaults.sampler, opened.defaults.latent_channels) == ("euler", 4)
    assert {tensor.file for tensor in opened.weights("unet").values()} == {path}


def test_a_single_files_fingerprint_covers_its_contents_and_tokenizers(single, tiny_checkpoint):
    path = single(SD1)
    shutil.copytree(tiny_checkpoint / "tokenizer", path.parent / "tokenizer")
    fingerprint = open_checkpoint(path).fingerprint
    renamed = path.rename(path.with_name("another name.safetensors"))
    assert open_checkpoint(renamed).fingerprint == fingerprint
    content = renamed.read_bytes()
    renamed.write_bytes(content[:-1] + b"7")
    changed = open_checkpoint(renamed).fingerprint
    assert changed != fingerprint
    (path.parent / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert open_checkpoint(renamed).fingerprint != changed


def test_a_single_files_tokenizers_come_from_the_hub(single, hub_cache, tiny_checkpoint):
    path = single(XL)
    output = in_a_new_process(PRINT.format(str(path)), hub_cache)
    assert output.startswith(f"InputError: {path} contains no tokenizer, ")
    assert "put the folder 'tokenizer'" in output
    assert "openai/clip-vit-large-patch14" in output
    for repository, folder in (
        ("models--openai--clip-vit-large-patch14", "."),
        ("models--stabilityai--stable-diffusion-xl-base-1.0", "tokenizer_2"),
    ):
        snapshot = hub_cache / repository / "snapshots" / COMMIT / folder
        shutil.copytree(tiny_checkpoint / "tokenizer", snapshot)
        (hub_cache / repository / "refs").mkdir()
        (hub_cache / repository / "refs" / "main").write_text(COMMIT)
    output = in_a_new_process(PRINT.format(str(path)), hub_cache)
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_checkpoint / "tokenizer", path.parent / folder)
    assert output == f"download {open_checkpoint(path).fingerprint}"


def test_the_error_for_another_file_format_tells_how_to_convert_it(tmp_path):
    path = tmp_path / "v1-5-pruned.ckpt"
    path.write_bytes(b"PK")
    assert "from_single_file" in refusal(str(path))
    path = path.rename(path.with_suffix(".safetensors"))
    assert f"{path} is not a safetensors file" in refusal(str(path))
    assert "single file and has no variants" in refusal(str(path), "fp16")
