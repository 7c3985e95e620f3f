"""Datasets and evaluations in a bucket, by the commands themselves; the server is Moto's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from jaxdiff import cli
from jaxdiff.dataset import ledger, names
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import Caption, Group

pytestmark = pytest.mark.usefixtures("noise_throughout")
ADDRESS = "s3://sets/made"
HASH = re.compile(r"(train-[0-9]{5}(-r[0-9]+)?)-[0-9a-f]{8}\.")


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def client(server, monkeypatch):
    """An empty bucket, to which this process's environment leads."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="sets")
    yield client
    for key in objects(client):
        client.delete_object(Bucket="sets", Key=key)
    client.delete_bucket(Bucket="sets")


def objects(client) -> dict[str, bytes]:
    """The objects in the bucket: their keys and bytes."""
    found = client.list_objects_v2(Bucket="sets").get("Contents", [])
    return {
        each["Key"]: client.get_object(Bucket="sets", Key=each["Key"])["Body"].read()
        for each in found
    }


def done(client) -> int:
    """The number of finished shards."""
    return client.list_objects_v2(Bucket="sets", Prefix="made/_jaxdiff/done/")["KeyCount"]


def images(files: dict[str, bytes]) -> dict[str, bytes]:
    """The image shards among some files, by their names without hashes."""
    return {
        HASH.sub(r"\1.", Path(name).name): content
        for name, content in files.items()
        if name.endswith(".tar")
    }


def verified(address: str) -> bool:
    return cli.main(["verify", address]) == 0


def test_a_killed_job_continues_and_makes_what_a_disk_gets(client, small_job, tmp_path, capsys):
    assert cli.main(small_job(tmp_path / "local")) == 0
    command = [sys.executable, "-m", "jaxdiff", *small_job(ADDRESS)]
    kills = 0
    for count in (1, 4):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while done(client) < count:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2
    assert done(client) < 10
    assert cli.main(small_job(ADDRESS)) == 0
    assert verified(ADDRESS)
    made, local = objects(client), (tmp_path / "local")
    on_disk = {str(path): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    assert images(made) == images(on_disk)
    for name in (names.REJECTED, names.FAILED, names.CROISSANT, names.DEVICE):
        assert made[f"made/{name}"] == (local / name).read_bytes()
    before = objects(client)
    assert cli.main(small_job(ADDRESS)) == 0
    assert "is already finished: 40 images" in capsys.readouterr().out
    assert objects(client) == before


def test_a_dataset_is_extended(client, small_job, capsys):
    address = ADDRESS
    assert cli.main(small_job(address, "--num-images=4")) == 0
    kept = images(objects(client))
    assert cli.main(small_job(address, "--num-images=6")) == 0
    assert "its 2 shards will not change" in capsys.readouterr().err
    assert kept.items() <= images(objects(client)).items()
    assert verified(address)
    assert cli.main(small_job(address, "--num-images=6", "--seed=1")) == 2
    assert "holds another run (seed 0 -> 1); name another prefix" in capsys.readouterr().err
    assert verified(address)


def test_a_copied_dataset_is_still_complete(client, small_job, tmp_path, capsys):
    assert cli.main(small_job(ADDRESS, "--num-images=4")) == 0
    for key, body in objects(client).items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    copy = tmp_path / "made"
    assert verified(str(copy))
    (copy / names.DATA).joinpath(sorted(os.listdir(copy / names.DATA))[1]).unlink()
    assert not verified(str(copy))
    assert cli.main(["verify", "--repair", str(copy)]) == 0
    assert verified(str(copy))
    assert cli.main(small_job(tmp_path / "local", "--num-images=4")) == 0
    for path in (tmp_path / "local").rglob("*"):
        if path.is_file():
            key = f"copied/{path.relative_to(tmp_path / 'local')}"
            client.put_object(Bucket="sets", Key=key, Body=path.read_bytes())
    assert verified("s3://sets/copied")
    assert cli.main(small_job("s3://sets/copied", "--num-images=6")) == 0
    assert verified("s3://sets/copied")
    assert "its 2 shards will not change" in capsys.readouterr().err


def test_damage_is_found(client, small_job, capsys):
    assert cli.main(small_job(ADDRESS, "--num-images=4")) == 0
    whole = objects(client)
    tar, marker = (next(key for key in whole if part in key) for part in (".tar", "/done/"))
    flipped = bytes([whole[tar][600] ^ 1])
    for key, body, said in (
        (tar, whole[tar][:600] + flipped + whole[tar][601:], "has changed: its SHA-256 is not"),
        (tar, None, "is missing"),
        ("made/data/mine.tar", b"x", "does not belong to the run"),
        (
            marker,
            whole[marker].replace(b'"made": 4', b'"made": 3'),
            "is damaged or belongs to another",
        ),
        ("made/README.md", b"# Mine", "README.md differs from what the run wrote"),
    ):
        if body is None:
            client.delete_object(Bucket="sets", Key=key)
        else:
            client.put_object(Bucket="sets", Key=key, Body=body)
        assert not verified(ADDRESS)
        assert said in capsys.readouterr().out
        if key in whole:
            client.put_object(Bucket="sets", Key=key, Body=whole[key])
        else:
            client.delete_object(Bucket="sets", Key=key)
    assert verified(ADDRESS)


def test_what_buckets_cannot_do_is_refused(client, small_job, capsys, tmp_path):
    client.put_object(Bucket="sets", Key="others/file.txt", Body=b"mine")
    for arguments, said in (
        (small_job(ADDRESS, "--overwrite"), "name a new prefix instead"),
        (small_job(ADDRESS, "--format=imagefolder"), "use webdataset or parquet"),
        (small_job("ftp://sets/made"), "ftp://sets/made is not the address of a bucket"),
        (small_job("s3:/sets/made"), "s3:/sets/made is not the address of a bucket; write it with"),
        (small_job("s3://none/made"), "s3://none/made: the bucket does not exist"),
        (small_job("s3://sets/others"), "holds other objects and no jaxdiff run (file.txt)"),
        (["verify", ADDRESS], "s3://sets/made holds no jaxdiff run"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    assert [*objects(client)] == ["others/file.txt"]
    assert cli.main(small_job(ADDRESS, "--num-images=2")) == 0
    for arguments, said in (
        (["verify", ADDRESS, "--repair"], "--repair needs a local directory"),
        (["view", ADDRESS], "a gallery without --output needs a local directory"),
    ):
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["view", ADDRESS, f"--output={tmp_path / 'gallery'}"]) == 0
    assert (tmp_path / "gallery/index.html").exists()


def test_the_lines_of_the_card_read_the_dataset(client, small_job, tmp_path):
    script = "import pandas\n"
    for format_ in ("webdataset", "parquet"):
        address = f"s3://sets/{format_}"
        assert cli.main(small_job(address, "--num-images=4", f"--format={format_}")) == 0
        card = objects(client)[f"{format_}/{names.CARD}"].decode()
        (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        script += f"""{lines.replace("DIR", address)}
assert len(images) == len(metadata) == 8
assert len(pandas.read_parquet("{address}/metadata")) == 8
"""
        if format_ == "webdataset":
            script += "assert sample['png'].size == images[0]['png'].size and len(tars) == 2\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ledger.verify("s3://sets/parquet") == ledger.verify("s3://sets/webdataset")


@pytest.fixture
def evaluation(tmp_path, tiny_checkpoint):
    """Returns the arguments that evaluate six images of three prompts: `evaluation(output, ...)`.

    They are generated, unless a dataset is given.
    """
    captions = (Caption((Group(shape),)) for shape in ("star", "ring", "circle"))
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps(shapes.row_for(each)) + "\n" for each in captions))

    def evaluation(output: Path | str, *more: str) -> list[str]:
        said = ["--benchmark=shapes", f"--prompts={prompts}", "--images=2", "--keep=best:shapes"]
        if not any("--dataset" in each for each in more):
            said += [f"--model={tiny_checkpoint}", "--steps=1", "--width=64", "--height=64"]
            said += ["--batch-size=2", "--images-per-shard=2"]
        return ["evaluate", *said, f"--output={output}", *more]

    return evaluation


@pytest.mark.slow
def test_a_killed_evaluation_continues_and_writes_what_a_disk_gets(client, evaluation, tmp_path):
    assert cli.main(evaluation(tmp_path / "local")) == 0
    command = [sys.executable, "-m", "jaxdiff", *evaluation("s3://sets/judged")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(scores(client)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed = scores(client)
    assert client.list_objects_v2(Bucket="sets", Prefix="judged/report")["KeyCount"] == 0
    assert cli.main(evaluation("s3://sets/judged")) == 0
    assert killed.items() <= scores(client).items()  # these were not written again
    made = {
        key.removeprefix("judged/"): body.replace(b"s3://sets/judged", bytes(tmp_path / "local"))
        for key, body in objects(client).items()
    }
    local = {
        path.relative_to(tmp_path / "local").as_posix(): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }
    del local["manifest.jsonl"]
    beside = {name for name in local if not name.startswith("dataset/")}
    assert {name for name in made if not name.startswith("dataset/")} == beside
    assert len(beside) == 24
    assert [name for name in beside if made[name] != local[name] and "scores/" not in name] == []
    assert verified("s3://sets/judged/dataset")


def scores(client) -> dict[str, datetime]:
    """The files of scores, and when they were written."""
    found = client.list_objects_v2(Bucket="sets").get("Contents", [])
    return {each["Key"]: each["LastModified"] for each in found if "/scores/0" in each["Key"]}


def test_a_layout_in_a_bucket_has_no_image_of_an_earlier_one(client, evaluation, tmp_path, capsys):
    assert cli.main(evaluation("s3://sets/judged", "--vary=steps=1,2")) == 0
    both = "judged/tiny-steps-{}/00002/samples/0001.png"
    assert {"judged/report.html", both.format(1), both.format(2)} < {*objects(client)}
    given = "--dataset=s3://sets/judged/tiny-steps-2/dataset"
    for name in ("00003/samples/0000.png", "best/images/7.png", "notes/7.png", "notes.txt"):
        client.put_object(Bucket="sets", Key=f"again/{name}", Body=b"mine")
    assert cli.main(evaluation("s3://sets/again", given)) == 0
    assert "Report: s3://sets/again/report.html" in capsys.readouterr().out
    there = {key.removeprefix("again/") for key in objects(client) if key.startswith("again/")}
    assert "00002/samples/0001.png" in there
    assert not {"00003/samples/0000.png", "best/images/7.png"} & there
    assert {"notes/7.png", "notes.txt"} < there
    export = ["evaluate", "--export=geneval", given, "--output=s3://sets/exported"]
    assert cli.main(export) == 0
    exported = {key for key in objects(client) if key.startswith("exported/")}
    assert {key.removeprefix("exported/") for key in exported} < there
    assert len(exported) == 12
    capsys.readouterr()
    for command, said in (
        (export, "s3://sets/exported holds other objects; name a new prefix"),
        (evaluation("s3://none/judged", given), "s3://none/judged: the bucket does not exist"),
        (evaluation("s3://none/judged"), "s3://none/judged: the bucket does not exist"),
        (evaluation("ftp://sets/judged", given), "ftp://sets/judged is not the address of a"),
        (evaluation("s3:/sets/judged", given), "s3:/sets/judged is not the address of a bucket"),
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
