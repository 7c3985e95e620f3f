"""The job files in configs/jobs, as far as they can be checked without a cluster."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pipelines import generate_options
from pipelines.jobs import EXIT_FAILED, EXIT_SOME_IMAGES_FAILED, EXIT_STOPPED

JOBS = Path(__file__).parents[2] / "configs" / "jobs"
PROGRAMS = Path(sys.executable).parent
DAY = "2026-11-28"
MINUTES = int(datetime(2026, 11, 28, 2, 15, tzinfo=UTC).timestamp()) // 60
REFUSED = 2  # the exit code of InputError
TERMINATED, KILLED = 128 + signal.SIGTERM, 128 + signal.SIGKILL
VM_PREEMPTED = 50001  # Cloud Batch's own
SECONDS = 30


def read(name: str) -> dict:
    return yaml.safe_load((JOBS / name).read_text())  # YAML includes JSON


CRONJOB, JOBSET = read("kubernetes/cronjob.yaml"), read("kubernetes/jobset.yaml")
(SLICES,) = JOBSET["spec"]["replicatedJobs"]
KUBERNETES = {
    "cronjob": CRONJOB["spec"]["jobTemplate"]["spec"],
    "jobset": SLICES["template"]["spec"],
}
(BATCH,) = read("batch/job.json")["taskGroups"]
SKYPILOT = read("skypilot/nightly.yaml")
SBATCH = JOBS / "slurm" / "nightly.sbatch"


def pod(job: dict) -> dict:
    return job["template"]["spec"]


def container(job: dict) -> dict:
    (only,) = pod(job)["containers"]
    return only


def variables(job: dict) -> dict[str, dict]:
    return {variable["name"]: variable for variable in container(job)["env"]}


def shell(text: str) -> list[str]:
    """Returns the words after `jaxdiff generate` in a shell script."""
    ((_, said),) = re.findall(r"^(exec )?jaxdiff generate ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [word for word in shlex.split(said.replace("\\\n", " ")) if word != "&"]


(CRONJOB_SCRIPT,) = container(KUBERNETES["cronjob"])["args"]
(BATCH_RUNNABLE,) = BATCH["taskSpec"]["runnables"]
COMMANDS = {
    "cronjob": shell(CRONJOB_SCRIPT),
    "jobset": container(KUBERNETES["jobset"])["command"][2:],
    "slurm": shell(SBATCH.read_text()),
    "skypilot": shell(SKYPILOT["run"]),
    "batch": BATCH_RUNNABLE["container"]["commands"][1:],
}


@pytest.mark.parametrize("file", COMMANDS)
def test_every_command_is_one_of_jaxdiff_and_takes_its_day_from_the_environment(file, monkeypatch):
    monkeypatch.setenv("JAXDIFF_DATE", DAY)
    job, rest = generate_options.parse(COMMANDS[file])
    assert rest == []  # Beam gets nothing
    assert job.manifest.endswith(f"/prompts/{DAY}.jsonl")
    assert str(job.output).endswith(f"/datasets/{DAY}")


def test_containers_without_a_shell_start_jaxdiff():
    assert container(KUBERNETES["jobset"])["command"][:2] == ["jaxdiff", "generate"]
    assert BATCH_RUNNABLE["container"]["entrypoint"] == "jaxdiff"
    assert BATCH_RUNNABLE["container"]["commands"][0] == "generate"
    assert variables(KUBERNETES["jobset"])["JAXDIFF_DATE"]["value"] == DAY
    assert BATCH["taskSpec"]["environment"]["variables"]["JAXDIFF_DATE"] == DAY


@pytest.mark.parametrize("text", [CRONJOB_SCRIPT, SKYPILOT["run"]], ids=["cronjob", "skypilot"])
def test_shells_are_replaced_by_jaxdiff(text):
    """Otherwise, the shell gets the SIGTERM, and jaxdiff does not stop after its batch."""
    assert "exec jaxdiff generate" in text
    assert text.rstrip().endswith(f"{shlex.quote(shell(text)[-1])}")  # nothing follows it


def as_job(spec: dict) -> dict:
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(version):
    """There is no schema of JobSets; that of their jobs is checked."""
    kubernetes_validate.validate(CRONJOB, version, strict=True)
    kubernetes_validate.validate(as_job(KUBERNETES["jobset"]), version, strict=True)
    misspelt = as_job(KUBERNETES["jobset"] | {"backoffLimits": 3})
    with pytest.raises(kubernetes_validate.ValidationError, match="backoffLimits"):
        kubernetes_validate.validate(misspelt, version, strict=True)


def test_a_jobset_has_the_fields_that_are_not_in_its_jobs():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JOBSET["spec"].keys() == {"ttlSecondsAfterFinished", "replicatedJobs"}
    assert SLICES.keys() == {"name", "replicas", "template"}
    assert JOBSET["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpu"}
    text = (JOBS / "kubernetes" / "jobset.yaml").read_text()
    assert f'sed "s/{DAY}/' in text  # replaces the first date in each line, so one a line
    assert all(line.count(DAY) <= 1 for line in text.splitlines())
    assert text.count(DAY) == 3


@pytest.mark.parametrize("job", KUBERNETES.values(), ids=KUBERNETES)
def test_kubernetes_acts_on_the_exit_codes(job):
    stop, disrupted, again = job["podFailurePolicy"]["rules"]
    name = container(job)["name"]
    codes = {"containerName": name, "operator": "In"}
    unusable = [REFUSED, EXIT_SOME_IMAGES_FAILED]
    assert stop == {"action": "FailJob", "onExitCodes": {**codes, "values": unusable}}
    stopped = [EXIT_STOPPED, TERMINATED]
    assert again == {"action": "Ignore", "onExitCodes": {**codes, "values": stopped}}
    condition = {"type": "DisruptionTarget", "status": "True"}
    assert disrupted == {"action": "Ignore", "onPodConditions": [condition]}
    assert job["backoffLimit"] > 0  # EXIT_FAILED
    assert job["activeDeadlineSeconds"] < 24 * 3600
    assert pod(job)["restartPolicy"] == "Never"  # required, but not by the schema
    assert pod(job)["terminationGracePeriodSeconds"] >= 60


def test_pods_that_share_the_work_begin_at_different_shards():
    cronjob, job = KUBERNETES["cronjob"], KUBERNETES["jobset"]
    assert cronjob["completions"] == cronjob["parallelism"] > 1
    assert cronjob["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX
    assert CRONJOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert SLICES["replicas"] > 1
    assert job["completions"] == job["parallelism"] == 1
    source = variables(job)["JOB_COMPLETION_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert source == "metadata.labels['jobset.sigs.k8s.io/job-index']"
    assert BATCH["taskCount"] == BATCH["parallelism"] > 1


def test_batch_retries_the_exit_codes_that_a_retry_can_mend():
    (policy,) = BATCH["taskSpec"]["lifecyclePolicies"]
    codes = [EXIT_FAILED, EXIT_STOPPED, KILLED, TERMINATED, VM_PREEMPTED]
    assert policy == {"action": "RETRY_TASK", "actionCondition": {"exitCodes": codes}}
    assert BATCH["taskSpec"]["maxRetryCount"] == 10  # the most that Batch allows


def test_the_workflow_sets_a_day_that_the_batch_job_has():
    set_day, create_job = read("batch/workflow.yaml")["main"]["steps"]
    (_, assigned) = set_day["set_day"]["assign"]
    ((path, value),) = assigned.items()
    assert value == "${day}"
    found = {"job": read("batch/job.json")}
    for name, index in re.findall(r"(\w+)(?:\[(\d)\])?", path):
        found = found[name][int(index)] if index else found[name]
    assert found == DAY
    assert create_job["create_job"]["args"]["body"] == "${job}"


def test_skypilot_recovers_only_stopped_jobs():
    resources = SKYPILOT["resources"]
    assert resources["use_spot"] is True
    assert resources["job_recovery"] == {
        "strategy": "EAGER_NEXT_REGION",
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [EXIT_STOPPED, TERMINATED],
    }
    assert SKYPILOT["envs"] == {"JAXDIFF_DATE": None}  # SkyPilot then asks for it


def test_the_sbatch_script_has_no_mistakes_that_shells_and_shellcheck_see():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    subprocess.run([PROGRAMS / "shellcheck", "--norc", SBATCH], check=True)


def test_the_sbatch_script_asks_for_an_array_a_signal_and_a_requeue():
    options = re.findall(r"^#SBATCH --(\S+)$", SBATCH.read_text(), re.MULTILINE)
    assert {"array=0-7", "requeue", "open-mode=append"} <= set(options)
    (seconds,) = (option for option in options if option.startswith("signal="))
    assert int(seconds.removeprefix("signal=B:TERM@")) >= 60


JAXDIFF = """\
#!/bin/sh
trap 'exit 75' TERM
touch "$STUBS/started"
[ -n "$CODE" ] && exit "$CODE"
while :; do sleep 0.05; done
"""
SCONTROL = """\
#!/bin/sh
echo "$@" >> "$STUBS/scontrol-said"
"""


@pytest.fixture
def start_sbatch(tmp_path):
    """Returns a function that starts the script with stubs of jaxdiff and scontrol."""
    started = []
    for name, text in (("jaxdiff", JAXDIFF), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(code: int | str, restarts: int = 0) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "STUBS": str(tmp_path),
            "CODE": str(code),
            "SLURM_ARRAY_JOB_ID": "9",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        started.append(subprocess.Popen(["bash", SBATCH], env=environment, process_group=0))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def catches_sigterm(process: subprocess.Popen) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_slurm_requeues_a_job_that_it_stops(tmp_path, start_sbatch):
    process = start_sbatch("")
    deadline = time.monotonic() + SECONDS
    while not ((tmp_path / "started").exists() and catches_sigterm(process)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # to the script only, as Slurm does
    assert process.wait(SECONDS) == EXIT_STOPPED
    assert (tmp_path / "scontrol-said").read_text() == "requeue 9_3\n"


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [
        (0, 0, False),
        (EXIT_FAILED, 9, True),
        (EXIT_FAILED, 10, False),
        (KILLED, 9, True),
        (KILLED, 10, False),
        (REFUSED, 0, False),
        (EXIT_SOME_IMAGES_FAILED, 0, False),
        (EXIT_STOPPED, 50, True),
        (TERMINATED, 50, True),
    ],
)
def test_slurm_requeues_by_exit_code(tmp_path, start_sbatch, code, restarts, is_requeued):
    assert start_sbatch(code, restarts).wait(SECONDS) == code
    assert (tmp_path / "started").exists()
    assert (tmp_path / "scontrol-said").exists() == is_requeued


@pytest.mark.usefixtures("noisy")
def test_the_cronjob_makes_the_dataset_of_its_scheduled_day(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / f"{DAY}.jsonl").write_text('{"prompt": "a red circle", "steps": 2}\n')
    script = CRONJOB_SCRIPT.replace("gs://my-bucket", str(tmp_path))
    label = variables(KUBERNETES["cronjob"])["JOB"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert label == "metadata.labels['batch.kubernetes.io/job-name']"
    environment = os.environ | {
        "JOB": f"{CRONJOB['metadata']['name']}-{MINUTES}",
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "JOB_COMPLETION_INDEX": "0",
    }
    assert container(KUBERNETES["cronjob"])["command"] == ["sh", "-c"]
    ended = subprocess.run(
        ["sh", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert f"1 image in {tmp_path}/datasets/{DAY} on " in ended.stdout
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == [DAY]
    assert (tmp_path / "datasets" / DAY / "_SUCCESS").exists()


@pytest.mark.jobs
def test_googles_client_reads_the_batch_job():
    from google.cloud import batch_v1
    from google.protobuf.json_format import ParseError

    text = (JOBS / "batch" / "job.json").read_text()
    (group,) = batch_v1.Job.from_json(text).task_groups
    (policy,) = group.task_spec.lifecycle_policies
    assert VM_PREEMPTED in policy.action_condition.exit_codes
    assert policy.action == batch_v1.LifecyclePolicy.Action.RETRY_TASK
    with pytest.raises(ParseError, match="taskCnt"):
        batch_v1.Job.from_json(text.replace('"taskCount"', '"taskCnt"'))
