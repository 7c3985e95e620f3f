"""Several processes on one output, without a launcher: arrays of jobs, or two terminals."""

import itertools
import os
import signal
import subprocess
import sys
import time

from injected import in_noise_at
from making import files

from jaxdiff import cli
from jaxdiff.dataset import names
from pipelines import processes


def test_a_scheduler_s_variables_give_a_process_its_place():
    for variables, place in (
        ({}, None),
        ({"JOB_COMPLETION_INDEX": ""}, None),
        ({"JOB_COMPLETION_INDEX": "3"}, processes.Place(3)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "2",
            },
            processes.Place(3, 4),
        ),
        # An array such as 0,10,20: its numbers are no places.
        ({"SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "3"}, processes.Place(20)),
        ({"BATCH_TASK_INDEX": "0", "BATCH_TASK_COUNT": "8"}, processes.Place(0, 8)),
        ({"CLOUD_RUN_TASK_INDEX": "1", "CLOUD_RUN_TASK_COUNT": "2"}, processes.Place(1, 2)),
    ):
        assert processes.place(variables) == place


def test_processes_begin_with_parts_of_their_own_and_go_on_with_any():
    todo = list(range(100, 203))
    parts = [processes.Place(index, 8).first(todo) for index in range(8)]
    assert sorted(itertools.chain(*parts)) == todo
    for place in (processes.Place(3, 8), processes.Place(3)):
        left = todo
        while left:
            part = place.next(left)
            assert part
            assert set(part) <= set(left)
            left = [shard for shard in left if shard not in part]
    starts = {processes.Place(index).first(todo)[0] for index in range(8)}
    assert len(starts) > 4
    assert processes.Place(7, 8).first([5]) == [5]  # with too few shards, any
    orders = [processes.shuffled(todo) for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == todo
    assert sum(a == b for a, b in zip(*orders, strict=True)) < len(todo) // 4  # not in step


def started(arguments: list[str], **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxdiff", *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_make_what_one_makes(tmp_path, small_job, noisy):
    assert cli.main(small_job(tmp_path / "alone", "--num-images=80")) == 0
    noisy(in_noise_at("", "import time; time.sleep(0.1)"))  # so that none makes all
    directory = tmp_path / "out"
    several = [
        started(
            small_job(directory, "--num-images=80"),
            BATCH_TASK_INDEX=str(index),
            BATCH_TASK_COUNT="2",
        )
        for index in range(2)
    ]
    said = [process.communicate()[0] for process in several]
    assert [process.returncode for process in several] == [0, 0], said
    assert sum("images/s per worker" in each for each in said) >= 1
    makers = {
        path.read_text().split('"attempt"')[1].split(",")[0].split("-")[-2]
        for path in (directory / names.DONE).iterdir()
    }
    assert len(makers) == 2  # none was idle
    assert cli.main(["verify", str(directory)]) == 0
    assert files(directory) == files(tmp_path / "alone")


def test_others_finish_without_a_process_that_is_suspended(tmp_path, small_job, noisy, capsys):
    noisy(in_noise_at("", "import time; time.sleep(0.02)"))  # so that it is suspended in time
    directory = tmp_path / "out"
    first = started(small_job(directory, "--num-images=80"))
    while len(list((directory / names.DONE).glob("*"))) < 2:
        time.sleep(0.05)
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    try:
        assert cli.main(small_job(directory, "--num-images=80")) == 0
        assert "40 shards" in capsys.readouterr().err
        assert cli.main(["verify", str(directory)]) == 0
        assert cli.main(small_job(directory, "--num-images=80", "--seed=3")) == 2
        assert "holds another run (seed 0 -> 3)" in capsys.readouterr().err
    finally:
        first.send_signal(signal.SIGCONT)
    said, _ = first.communicate()
    assert first.returncode == 0, said
    assert "finished by another process" in said
    assert cli.main(["verify", str(directory)]) == 0
