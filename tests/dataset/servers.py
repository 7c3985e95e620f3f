"""Object stores that run here: each a process of its own, on a port of its own."""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

STARTING_SECONDS = 60.0
BUCKET = "bucket"
ACCOUNT = "devstoreaccount1"
# The key that all emulators of Azure have.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE = "azurite-blob"


@dataclass(frozen=True)
class Server:
    """A running object store with the empty bucket `BUCKET`."""

    scheme: str
    port: int

    def at(self, port: int) -> "Server":
        """The same server behind a proxy."""
        return replace(self, port=port)

    def address(self, prefix: str) -> str:
        return f"{self.scheme}://{BUCKET}/{prefix}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that lead obstore to the server."""
        url = f"http://127.0.0.1:{self.port}"
        if self.scheme == "s3":
            return {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        if self.scheme == "az":
            return {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url}
        nobody = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        key = {"gcs_base_url": url, "disable_oauth": True, **nobody}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key)}


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """Amazon S3 by Moto."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port, folder / "moto.log"):
        _put(f"http://127.0.0.1:{port}/{BUCKET}")
        yield Server("s3", port)


@contextlib.contextmanager
def gcs(folder: Path) -> Iterator[Server]:
    """Google Cloud Storage by our own fake of it."""
    port = _free_port()
    command = [sys.executable, str(Path(__file__).with_name("fake_gcs.py")), str(port), BUCKET]
    with _running(command, port, folder / "gcs.log"):
        yield Server("gs", port)


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Server]:
    """Azure Blob Storage by Azurite, which `npm install -g azurite` installs."""
    assert shutil.which(AZURITE), f"{AZURITE} is not on the PATH; run npm install -g azurite"
    port = _free_port()
    said = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    said += ["--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    with _running([AZURITE, *said], port, folder / "azurite.log"):
        path = f"/{ACCOUNT}/{BUCKET}"
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": date, "x-ms-version": "2023-11-03"}
        named = "".join(f"{name}:{value}\n" for name, value in headers.items())
        text = "PUT" + "\n" * 12 + f"{named}/{ACCOUNT}{path}\nrestype:container"
        signed = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}"
        _put(f"http://127.0.0.1:{port}{path}?restype=container", headers)
        yield Server("az", port)


SERVERS = {"moto": moto, "gcs": gcs, "azurite": azurite}


@contextlib.contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ})
    try:
        end = time.monotonic() + STARTING_SECONDS
        while not _is_open(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _put(url: str, headers: dict[str, str] | None = None) -> None:
    asked = urllib.request.Request(url, method="PUT", headers=headers or {}, data=b"")
    asked.add_unredirected_header("Content-type", "")  # urllib's own would have to be signed
    with urllib.request.urlopen(asked) as answer:
        assert answer.status in (200, 201)
