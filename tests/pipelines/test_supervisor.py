"""The devices that a worker sees, and how a job with several workers ends."""

import signal
import subprocess
import sys
import time

import pytest
from injected import in_noise_at
from making import files

from jaxdiff import cli
from jaxdiff.errors import InputError
from pipelines import supervisor


@pytest.mark.parametrize(
    ("said", "count", "shares"),
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("5,GPU-8f3a", 2, ["5", "GPU-8f3a"]),
        ("0,1", 1, ["0,1"]),
        ("", 3, ["", "", ""]),
    ],
)
def test_gpus_are_divided_among_workers(said, count, shares):
    environment = {"CUDA_VISIBLE_DEVICES": said, "HOME": "/home"}
    dealt = [supervisor.device_share(index, count, environment) for index in range(count)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in dealt] == shares
    assert all(share["HOME"] == "/home" for share in dealt)


def test_gpus_that_cannot_be_divided_evenly_are_rejected():
    with pytest.raises(InputError, match="--workers 2: 3 GPUs cannot be divided evenly"):
        supervisor.device_share(0, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_cpus_are_shared():
    environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert supervisor.device_share(1, 2, environment) == environment


def test_an_error_in_one_of_two_workers_ends_the_job(tmp_path, command, capfd):
    assert cli.main(command(tmp_path / "out", "--workers=2", "--mesh=data=64")) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("jaxdiff: --mesh data=64: needs 64 devices")
    assert not any("Traceback" in line for line in said)


def test_two_workers_stop_together(tmp_path, command, noisy, noise):
    noisy(in_noise_at("", "import time; time.sleep(0.1)"))  # so that they can be stopped
    directory = tmp_path / "out"
    arguments = command(directory, "--num-images=40", "--workers=2")
    job = [sys.executable, "-m", "jaxdiff", *arguments]
    with subprocess.Popen(job, stderr=subprocess.PIPE, text=True) as process:
        while not (directory / "_jaxdiff" / "done").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 75
    assert (
        said.splitlines()[-1] == f"jaxdiff: stopped; run the same command to continue {directory}"
    )
    assert not list((directory / "_jaxdiff" / "tmp").iterdir())
    noisy()
    assert cli.main(arguments) == 0
    assert files(directory) == files(noise("--num-images=40"))
