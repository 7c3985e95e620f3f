"""What lies where in a dataset."""

WORK = "_jaxdiff"
PLAN = f"{WORK}/plan"
DONE = f"{WORK}/done"
TMP = f"{WORK}/tmp"
LOCK = f"{WORK}/lock"
DEVICE = f"{WORK}/device"  # the kind that makes the run's images
BATCH = f"{WORK}/batch"  # for each bucket, how many images an accelerator takes at once
OLD = f"{WORK}/old"  # the run that --overwrite replaces, until the new one has made a shard
DATA = "data"
METADATA = "metadata"
SUCCESS = "_SUCCESS"
REJECTED = "rejected.jsonl"
FAILED = "failed.jsonl"
REPORT = "run.json"
CARD = "README.md"
CROISSANT = "croissant.json"
# All that a run leaves, in the order in which it is deleted: what has lost a file must not look
# finished, and while the plan is there the directory is known as ours.
OURS = (
    *(SUCCESS, DONE, DEVICE, BATCH, DATA, METADATA),
    *(CARD, CROISSANT, REPORT, REJECTED, FAILED, PLAN),
)
