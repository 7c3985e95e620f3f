"""The plan: which image stands in which batch of which shard, fixed before anything is made.

A plan is a Parquet file with a row an image, shard after shard, and `plan.json`, which names it.
Shards are pure: all their images can run through one compiled program. The plan's id is the digest
of everything that decides the dataset's bytes; each shard has an id of its own, because a plan that
asks for more images of the same kind may take the place of a smaller one, whose shards stay as they
are.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pyarrow as pa

from jaxdiff.checkpoint import lora
from jaxdiff.dataset import formats, names
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.settings import Settings
from jaxdiff.errors import InputError
from jaxdiff.request import FIELDS, Options, Request

VERSION = 5
PLAN_JSON = "plan.json"
# The job's own, or not known yet.
NOT_PLANNED = ("noise", "dtype", "options", "model", "sha256", "pixel_sha256")
SCHEMA = pa.schema(
    [
        *(field for field in formats.RECORD_FIELDS if field[0] not in NOT_PLANNED),
        ("source", pa.string()),
        ("line", pa.int64()),
    ]
)
ROW_GROUP_IMAGES = 4096  # at least, in whole shards: the files say a little about every row group


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image to make.

    Attributes:
      key: 9 digits, in the manifest's order; what extends a plan comes after it.
      id: its row's.
      image_index: which of its row's images it is.
      request: resolved; nothing is left to the model.
      metadata: its row's other columns, a JSON object.
      source: the file of the manifest that its row stands in.
      line: of its row there.
    """

    key: str
    id: str
    image_index: int
    request: Request
    metadata: str
    source: str
    line: int

    def columns(self) -> dict:
        """The image as a row of the plan."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | vars(own.pop("request"))


@dataclass(frozen=True)
class Plan:
    """What `plan.json` says.

    Attributes:
      identity: all that decides the dataset's bytes; `id` is its digest.
      manifest: the path that it was made from.
      model_name: the model's name; its fingerprint stands in `identity`.
      models: the arguments with which `jaxdiff.load` finds the model again.
      rows: how many of the manifest's rows are blank, rejected and accepted.
      shard_sizes: images in each shard.
      shard_ids: the digest of all that decides each shard's bytes.
      sha256: of the plan's other files, by name.
    """

    id: str
    identity: dict
    manifest: str
    model_name: str
    models: dict[str, str | Sequence[str] | None]
    rows: dict[str, int]
    shard_sizes: list[int]
    shard_ids: list[str]
    sha256: dict[str, str]

    @property
    def images_file(self) -> str:
        """The name of its Parquet file."""
        return f"images-{self.id[:16]}.parquet"

    @property
    def rejected_file(self) -> str:
        """The name of the file of the rows that it rejects."""
        return f"rejected-{self.id[:16]}.jsonl"

    @property
    def settings(self) -> Settings:
        """The settings that it was made with; an option that it does not name has its default."""
        known = {field.name for field in fields(Settings)}
        return Settings(**{name: self.identity[name] for name in known & self.identity.keys()})

    @property
    def options(self) -> str:
        """The model's options that are not as usual, and its LoRAs: "name=value, name=value"."""
        settings, elsewhere = self.settings, ("noise", "dtype", "mesh", "scheduler")
        changed = [
            f"{field.name}={getattr(settings, field.name)}"
            for field in fields(Options)
            if field.name not in elsewhere and getattr(settings, field.name) != field.default
        ]
        changed += [f"lora={lora.parse(said).name}" for said in self.models.get("lora", ())]
        return ", ".join(changed + [settings.scheduler] * bool(settings.scheduler))

    @property
    def images(self) -> int:
        """How many images are planned."""
        return sum(self.shard_sizes)


def digest(identity: dict) -> str:
    """The plan's id: SHA-256 (hex) of `identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def load(store: LocalStore) -> Plan | None:
    """The plan of a dataset, None where there is none.

    Raises:
      InputError: if it cannot be read, or not by this version.
    """
    path = store.path(f"{names.PLAN}/{PLAN_JSON}")
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
        if said["identity"]["plan_version"] != VERSION:
            raise ValueError("another version of jaxdiff made it")
        plan = Plan(**said)
        if plan.id != digest(plan.identity):
            raise ValueError("its settings do not have its id")
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise InputError(f"{path} cannot be used ({problem}); --overwrite starts anew") from None
    return plan


def differences(old: dict, new: dict) -> str:
    """What changed from one identity to the next, on one line."""
    return ", ".join(
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def planned_images(table: pa.Table) -> list[PlannedImage]:
    """The rows of a plan's Parquet file as images."""
    return [
        PlannedImage(
            request=Request(**{name: row.pop(name) for name in FIELDS if name in row}), **row
        )
        for row in table.to_pylist()
    ]
