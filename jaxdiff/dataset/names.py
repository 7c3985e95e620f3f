"""The names of files and folders in a dataset."""

WORK = "_jaxdiff"
PLAN = f"{WORK}/plan"
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
