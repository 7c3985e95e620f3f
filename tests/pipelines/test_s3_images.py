"""Sources at s3:// addresses, read from a real server: Moto's, as other tests' images are files."""

import io
import json
import socket

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from PIL import Image

from jaxdiff import cli
from jaxdiff.checks import BadValueError
from jaxdiff.dataset import run as runs
from jaxdiff.images import sources


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def account(monkeypatch):
    """Points this process and its workers to an address: `account(port)`."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def account(port: int) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()

    yield account
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(account):
    """A bucket with the objects a.png and b.png, as a client and its name."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    account(server.get_host_and_port()[1])
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for number, key in enumerate(("a.png", "sets/b.png")):
        client.put_object(Bucket="bucket", Key=key, Body=png(number))
    yield client
    server.stop()


def test_objects_are_read_and_what_is_not_there_is_named(bucket):
    assert sources.read("s3://bucket/a.png", "/tmp") == png(0)
    assert sources.read("sets/b.png", "s3://bucket") == png(1)
    bucket.put_object(Bucket="bucket", Key="a.png", Body=png(2))  # nothing old is remembered
    assert sources.read("s3://bucket/a.png", "/tmp") == png(2)
    bucket.put_object(Bucket="bucket", Key="empty.png", Body=b"")
    for place, expected in (
        ("s3://bucket/none.png", "does not exist or cannot be reached; check the address"),
        ("s3://other/a.png", "does not exist or cannot be reached; check the address"),
        ("s3://bucket/sets", "is a folder; name a file"),
        ("s3://bucket/empty.png", "is an empty file; replace it"),
    ):
        with pytest.raises(BadValueError) as caught:
            sources.read(place, "/tmp")
        assert str(caught.value) == f"image {place} {expected}"


@pytest.mark.usefixtures("noisy")
def test_missing_and_changed_objects_concern_their_rows_alone(
    bucket, generate, tmp_path, monkeypatch
):
    begin = runs.begin

    def planned(*said):
        run = begin(*said)
        bucket.put_object(Bucket="bucket", Key="sets/b.png", Body=png(9))
        return run

    monkeypatch.setattr(runs, "begin", planned)
    names = ("s3://bucket/a.png", "s3://bucket/none.png", "s3://bucket/sets/b.png")
    assert generate([{"image": name} for name in names], "--steps=2") == 3
    out = tmp_path / "out"
    (rejected,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], "none.png does not exist" in rejected["reason"]) == (2, True)
    (failed,) = map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    assert failed["reason"] == "s3://bucket/sets/b.png has changed since the job was planned"
    made = [
        row["init_image"] for row in pq.read_table(out / "metadata").to_pylist() if row["sha256"]
    ]
    assert made == ["s3://bucket/a.png"]
    assert cli.main(["verify", str(out)]) == 0


def test_a_server_that_does_not_answer_is_left_in_time(account, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        account(server.getsockname()[1])
        with pytest.raises(BadValueError, match=r"did not arrive in 2 seconds; check the network"):
            sources.read("s3://bucket/a.png", "/tmp")
