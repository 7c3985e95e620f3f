"""Makes datasets without a model: real files, with pixels drawn from the images' seeds."""

import json
from pathlib import Path

import numpy as np

from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import planning
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.store import open_store
from jaxdiff.families.opening import open_ensemble

FACTS = {
    "device": "1 x test",
    "padded": 0,
    "versions": {},
    "seconds": {"load": 1.0, "compile": 0.5, "generate": 2.0},
}


def pixels_of(image: plans.PlannedImage, salt: int = 0) -> np.ndarray:
    shape = (image.request.height, image.request.width, 3)
    random = np.random.default_rng([image.request.seed, salt])
    return random.integers(0, 256, shape, dtype=np.uint8)


def make_plan(
    where: Path | str, manifest: Path, checkpoint: Path, extended: Run | None = None, **said
) -> Run:
    opened = open_ensemble(checkpoint)
    settings = job_settings.resolve({"width": 16, "height": 8, **said}, opened)
    found = manifests.find(manifest)
    identity = planning.identify(found, settings, opened)
    store = open_store(where)
    folder = store.scratch("plan")
    models = {"model": str(checkpoint), "variant": None, "refiner": None}
    planning.make(found, settings, opened, identity, folder, models=models, extended=extended)
    return runs.begin(folder, store, extended)


def make_shard(run: Run, shard: int, failing=(), salt: int = 0, facts: dict = FACTS) -> bool:
    with shards.Attempt(run, shard) as attempt:
        for image in run.planned(shard):
            if image.key in failing:
                attempt.add_failed(image, "not finite")
            else:
                attempt.add(shards.encode(image, pixels_of(image, salt), run.plan))
        return attempt.commit(facts)


def files(directory: Path) -> dict[str, bytes]:
    """Returns the contents of the dataset's files, except those that contain times.

    Of `_SUCCESS`, it returns all but the digests of those files and of earlier revisions.
    """
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name != "run.json"
        and path.parent.name != "done"
        and path.name != "lock"
    }
    if "_SUCCESS" in found:
        found["_SUCCESS"] = timeless(found["_SUCCESS"])
    return found


def timeless(root: bytes) -> bytes:
    said = json.loads(root)
    for name in ("markers", "earlier"):
        said.pop(name, None)
    said.get("sha256", {}).pop("run.json", None)
    return json.dumps(said).encode()
