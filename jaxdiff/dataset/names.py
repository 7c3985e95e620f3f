"""The names of files and folders in a dataset."""

import re
from pathlib import PurePosixPath

WORK = "_jaxdiff"
PLAN = f"{WORK}/plan"
PLAN_JSON = "plan.json"
PLAN_FILE = f"{PLAN}/{PLAN_JSON}"
DONE = f"{WORK}/done"
TMP = f"{WORK}/tmp"
LOCK = f"{WORK}/lock"
DEVICE = f"{WORK}/device"  # the kind of device that generates the run's images
BATCH = f"{WORK}/batch"  # for each bucket, the batch size per accelerator
OLD = f"{WORK}/old"  # the run that --overwrite replaces, until the new one has a shard
DATA = "data"
METADATA = "metadata"
FOLDERS = (WORK, PLAN, DONE, TMP, BATCH, OLD, DATA, METADATA)
SUCCESS = "_SUCCESS"
REJECTED = "rejected.jsonl"
FAILED = "failed.jsonl"
REPORT = "run.json"
CARD = "README.md"
CROISSANT = "croissant.json"
BESIDE = ("gallery", "contact_sheet.png")  # what our other tools write into a dataset
# All that a run writes, in the order in which it is deleted: an incomplete dataset must not look
# finished, and the plan, deleted last, identifies the directory as a run.
OURS = (
    *(SUCCESS, DONE, DEVICE, BATCH, DATA, METADATA),
    *(CARD, CROISSANT, REPORT, REJECTED, FAILED, PLAN),
)
HASHED = re.compile(r"train-(?P<shard>[0-9]{5,})(-r(?P<again>[0-9]+))?-[0-9a-f]{8}\.[a-z]+")


def hashed(name: str, revision: int, sha256: str) -> str:
    """Returns the name of a shard's file in a bucket, where other contents have other names."""
    path = PurePosixPath(name)
    again = f"-r{revision}" if revision else ""
    return f"{path.parent}/{path.stem}{again}-{sha256[:8]}{path.suffix}"
