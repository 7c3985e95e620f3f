"""Writers that race for the shards of a dataset in a bucket and are killed at random.

    python tests/dataset/bucket_writers.py ADDRESS FOLDER SEED KILLS salted|equal

Does not import JAX, and makes no request before it forks. Each writer makes the shards that it
finds missing. Two of the six try every shard in the same order without looking, and finish the
dataset; the others begin elsewhere and look first. What each attempt believes
about its outcome goes to FOLDER/beliefs.jsonl. Prints how many writers were killed, how many gave
up and how long it took.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import making

from jaxdiff.dataset import bucket, ledger
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run

WRITERS, RUDE = 6, 2
BELIEFS = "beliefs.jsonl"
NO_SHARD = -1  # of a belief about the whole dataset: why it cannot be finished
GAVE_UP = 70  # exit code: nobody could say what has happened, so the command should run again
POLL_SECONDS = 0.01
KILL_SECONDS = 0.3  # on average between two kills
REQUEST_SECONDS, UPLOAD_SECONDS, CLAIM_SECONDS, FINISHING_SECONDS = 0.6, 0.6, 10.0, 4.0


def write(address: str, beliefs: Path, number: int, attempt: int, is_salted: bool) -> None:
    """Writes as one writer; `attempt` is unique among all processes."""

    def believe(shard: int, outcome: str) -> None:
        line = json.dumps({"shard": shard, "attempt": attempt, "outcome": outcome}) + "\n"
        os.write(log, line.encode())  # at once, so lines do not mix

    log = os.open(beliefs, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run = open_run(address)
    facts, salt = {**making.FACTS, "attempt": attempt}, attempt if is_salted else 0
    while todo := ledger.todo(run):
        start = 0 if number < RUDE else len(todo) * number // WRITERS
        for shard in todo[start:] + todo[:start]:
            if number >= RUDE and run.store.kind(shards.marker_name(shard)) is None:
                continue
            believe(shard, "trying")
            is_first = making.make_shard(run, shard, salt=salt, facts=facts)
            believe(shard, "won" if is_first else "lost")
    if number >= RUDE:
        return
    bucket.REQUEST_SECONDS = FINISHING_SECONDS  # listings take longer
    if ledger.finished(run):
        return
    try:
        ledger.finalize(run, 0.0)
    except ledger.IncompleteError as problem:
        believe(NO_SHARD, str(problem))


def started(function) -> int:
    """Starts a writer in a process of its own; returns the process id."""
    process = os.fork()
    if process:
        return process
    try:
        function()
    except OSError as problem:
        print(problem, file=sys.stderr)
        os._exit(GAVE_UP)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def race(address: str, folder: str, seed: str, kills: str, salts: str) -> None:
    bucket.REQUEST_SECONDS, bucket.UPLOAD_SECONDS = REQUEST_SECONDS, UPLOAD_SECONDS
    bucket.CLAIM_SECONDS = CLAIM_SECONDS
    began, chance, attempts = time.monotonic(), random.Random(int(seed)), iter(range(10**6))
    killed, gave_up = 0, 0

    def start(number: int) -> int:
        beliefs, attempt = Path(folder, BELIEFS), next(attempts)
        return started(partial(write, address, beliefs, number, attempt, salts == "salted"))

    writers = {number: start(number) for number in range(WRITERS)}
    next_kill = began + chance.expovariate(1 / KILL_SECONDS)
    while writers:
        time.sleep(POLL_SECONDS)
        if killed < int(kills) and time.monotonic() > next_kill:
            os.kill(writers[chance.choice([*writers])], signal.SIGKILL)
            next_kill = time.monotonic() + chance.expovariate(1 / KILL_SECONDS)
        for number, process in [*writers.items()]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, GAVE_UP, -signal.SIGKILL), f"writer {number} ended with {code}"
            killed, gave_up = killed + (code == -signal.SIGKILL), gave_up + (code == GAVE_UP)
            if code:
                writers[number] = start(number)
            else:
                del writers[number]
    said = {"kills": killed, "gave_up": gave_up, "seconds": time.monotonic() - began}
    print(json.dumps(said))


if __name__ == "__main__":
    race(*sys.argv[1:])
