"""The plan: which image is in which batch of which shard, fixed before generation starts.

A plan is a Parquet file with one row per image, shard after shard, and `plan.json`, which names it.
All images of a shard belong to one bucket, so they run through one compiled program. The plan's id
is the digest of everything that determines the dataset's bytes. Each shard has its own id because a
plan may be extended: a plan for more images of the same kind replaces it and keeps its shards.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from jaxdiff.checkpoint import controlnet, lora
from jaxdiff.dataset import formats, names
from jaxdiff.dataset.settings import Settings
from jaxdiff.dataset.store import Store
from jaxdiff.errors import InputError
from jaxdiff.families import second_pass
from jaxdiff.images import sources
from jaxdiff.request import (
    FIELDS,
    IMAGE_COLUMNS,
    LATER_COLUMNS,
    Options,
    Request,
    Source,
    from_columns,
    to_columns,
)

VERSION = 5
# Shared by the whole job, or not known yet.
NOT_PLANNED = (
    *("noise", "dtype", "options", "model", "model_name", "sha256", "pixel_sha256"),
    *formats.UPSCALED,
)
# The arguments of `jaxdiff.load` that name models.
MODELS = ("model", "variant", "refiner", "lora", "base", "controlnet", "ip_adapter", "upscale")
ROW_GROUP_IMAGES = 4096  # at least, in whole shards; each row group adds metadata


class PlannedImage(NamedTuple):
    """One image to generate.

    Attributes:
      key: 9 digits, in the manifest's order; the images of an extension come last.
      id: the id of its row.
      image_index: its index among the images of its row.
      request: with every field resolved (not None).
      metadata: the other columns of its row, as a JSON object.
      source: the manifest file that contains its row.
      line: the line of its row in that file.
      tokens_lost: how many tokens are cut off its prompt and its negative prompt; None in plans
        that earlier versions made.
    """

    key: str
    id: str
    image_index: int
    request: Request
    metadata: str
    source: str
    line: int
    tokens_lost: int | None = None


@dataclass(frozen=True)
class Plan:
    """The content of `plan.json`.

    Attributes:
      identity: everything that determines the dataset's bytes; `id` is its digest.
      manifest: the path of the manifest.
      model_name: the model's name; its fingerprint is in `identity`.
      models: the arguments of `jaxdiff.load` that load the model again.
      rows: the numbers of blank, rejected and accepted rows in the manifest.
      shard_sizes: the number of images in each shard.
      shard_ids: for each shard, the digest of everything that determines its bytes.
      sha256: the SHA-256 of the plan's other files, by name.
      notices: what the job does that the manifest's author may not expect; see `notices.Notices`.
      counts_tokens: whether records say how many tokens their prompts lost, as they do unless an
        earlier version made the plan or the one that it extends.
      record_version: 2 since records name their model and `datasets` reads their metadata as JSON
        in all formats; 1 if an earlier version made the plan or the one that it extends.
      takes_images: whether any row has an image; only then do records have the columns of images.
      image_root: the folder or URL that addresses of images are relative to.
      later_columns: those of `LATER_COLUMNS` that rows have values for and records have.
      enlarges: by how much the model enlarges the rows' images; 1 if it does not.
      upscales: by how much the finished images are enlarged; None if they are not.
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
    notices: dict[str, str] = field(default_factory=dict)
    counts_tokens: bool = False
    record_version: int = 1
    takes_images: bool = False
    image_root: str = ""
    later_columns: Sequence[str] = ()
    enlarges: int = 1
    upscales: float | None = None

    @cached_property
    def record_fields(self) -> formats.Fields:
        """The names and types of the fields of its images' records."""
        missing = () if self.counts_tokens else ("tokens_lost",)
        missing += () if self.record_version > 1 else ("model_name",)
        missing += () if self.upscales else formats.UPSCALED
        columns = LATER_COLUMNS if self.takes_images else IMAGE_COLUMNS
        missing += tuple(name for name in columns if name not in self.later_columns)
        return [each for each in formats.RECORD_FIELDS if each[0] not in missing]

    @property
    def shard_fields(self) -> formats.Fields:
        """The fields of its images' records, with their types in shards and for `datasets`."""
        kinds = {"metadata": pa.json_()} if self.record_version > 1 else {}
        return [(name, kinds.get(name, kind)) for name, kind in self.record_fields]

    @property
    def schema(self) -> pa.Schema:
        """The schema of the plan's Parquet file: that of its records and where rows are from."""
        planned = [each for each in self.record_fields if each[0] not in NOT_PLANNED]
        return pa.schema([*planned, ("source", pa.string()), ("line", pa.int64())])

    @property
    def images_file(self) -> str:
        """The name of the plan's Parquet file."""
        return f"images-{self.id[:16]}.parquet"

    @property
    def rejected_file(self) -> str:
        """The name of the file that lists the rejected rows."""
        return f"rejected-{self.id[:16]}.jsonl"

    @cached_property
    def settings(self) -> Settings:
        """The settings of the plan; an option missing from it has its default."""
        known = {option.name for option in fields(Settings)}
        return Settings(**{name: self.identity[name] for name in known & self.identity.keys()})

    @cached_property
    def options(self) -> str:
        """The model's non-default options and its LoRAs: "name=value, name=value"."""
        settings, elsewhere = self.settings, ("noise", "dtype", "mesh", "scheduler")
        changed = [
            f"{option.name}={getattr(settings, option.name)}"
            for option in fields(Options)
            if option.name not in elsewhere and getattr(settings, option.name) != option.default
        ]
        changed += [f"lora={lora.parse(said).name}" for said in self.models.get("lora", ())]
        for name in ("controlnet", "ip_adapter"):
            for said in self.models.get(name, ()):
                path, scale = controlnet.scaled(said)
                changed.append(f"{name}={Path(path).name.removesuffix('.safetensors')}:{scale:g}")
        if self.upscales:
            changed.append(f"upscale={self._upscaler()}")
        return ", ".join(changed + [settings.scheduler] * bool(settings.scheduler))

    def _upscaler(self) -> str:
        said = self.models["upscale"]
        if second_pass.is_asked(said):
            again = second_pass.parse(said)
            return f"{second_pass.LATENT}:{again.factor:g} with strength {again.strength:g}"
        path, _ = controlnet.split_number(said)
        return f"{Path(path).name.removesuffix('.safetensors')}:{self.upscales:g}"

    @property
    def images(self) -> int:
        """The number of planned images."""
        return sum(self.shard_sizes)


# The columns that decide an image's bucket.
BUCKET_COLUMNS = (
    *("width", "height", "steps", "guidance_scale", "sampler"),
    *("strength", "mask_image", "outpaint", "image_guidance_scale"),
    *("control_guidance_start", "control_guidance_end", "control_mode"),
)


def example(
    models: Mapping[str, Sequence[str]],
    *,
    strength: float | None = None,
    mask_image: str | None = None,
    outpaint: str | None = None,
    image_guidance_scale: float | None = None,
    control_mode: str | None = None,
    **values,
) -> Request:
    """Returns a request without a prompt in the bucket of these values of `BUCKET_COLUMNS`.

    Its images cannot be read. Whether there is a mask counts, not which; of an image guidance
    scale, whether guidance is off because of it; and of control modes, how many there are.

    Args:
      models: the plan's: every row has an image for each ControlNet and IP-Adapter.
    """
    nothing = Source("", "")
    is_controlled = values.get("control_guidance_start") is not None
    is_masked = mask_image is not None or outpaint is not None
    nets = models.get("controlnet", ())
    modes = from_columns({"prompt": "", "control_mode": control_mode}).control_mode
    if image_guidance_scale is not None:
        image_guidance_scale = float(image_guidance_scale >= 1)
    return Request(
        prompt="",
        image=nothing if strength is not None else None,
        strength=strength,
        mask_image=nothing if is_masked else None,
        image_guidance_scale=image_guidance_scale,
        # A model may see one without a ControlNet, and a union ControlNet several.
        control_image=(nothing,) * (len(modes or nets) or is_controlled) or None,
        control_mode=modes and (0,) * len(modes),
        ip_adapter_image=(nothing,) * len(models.get("ip_adapter", ())) or None,
        **values,
    )


def digest(identity: dict) -> str:
    """Returns the plan's id: the SHA-256 (hex) of `identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def load(store: Store) -> Plan | None:
    """Returns the plan of a dataset, or None if there is none.

    Raises:
      InputError: if it cannot be read by this version.
    """
    if store.kind(names.PLAN_FILE) == "is missing":
        return None
    try:
        said = json.loads(store.read(names.PLAN_FILE))
        if said["identity"]["plan_version"] != VERSION:
            raise ValueError("it was written by another version of jaxdiff")
        plan = Plan(**said)
        if plan.id != digest(plan.identity):
            raise ValueError("its id does not match its settings")
        if not _is_sound(plan):
            raise ValueError("it is damaged")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as problem:
        raise InputError(
            f"{store.address}/{names.PLAN_FILE} cannot be used ({problem}); start a new run with "
            "--overwrite"
        ) from None
    return plan


def _is_sound(plan: Plan) -> bool:
    """Returns whether what the plan's id does not cover has the types of a plan."""
    numbers = [*plan.rows.values(), *plan.shard_sizes]
    return (
        plan.rows.keys() == {"blank", "rejected", "accepted"}
        and all(type(number) is int and number >= 0 for number in numbers)
        and 0 < len(plan.shard_sizes) == len(plan.shard_ids)
        and 0 not in plan.shard_sizes
        and all(re.fullmatch(r"[0-9a-f]{32}", shard_id) for shard_id in plan.shard_ids)
        and all(re.fullmatch(r"[a-z]+-[0-9a-f]{16}\.[a-z]+", name) for name in plan.sha256)
        and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in plan.sha256.values())
        and plan.models.keys() <= {*MODELS}
        and isinstance(plan.models["model"], str)
        and isinstance(plan.options, str)
        and isinstance(plan.manifest, str)
        and isinstance(plan.model_name, str)
        and plan.record_version in (1, 2)
        and sources.is_root(plan.image_root)
        and {*plan.later_columns} <= {*LATER_COLUMNS}
        and type(plan.enlarges) is int
        and isinstance(plan.upscales, int | float | None)
    )


def differences(old: dict, new: dict) -> str:
    """Returns the differences between two identities, on one line."""
    return ", ".join(
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def planned_columns(images: Sequence[PlannedImage]) -> dict[str, Sequence]:
    """Returns the columns of a plan's Parquet file for these images."""
    own = dict(zip(PlannedImage._fields, zip(*images, strict=True), strict=True))
    return own | to_columns(own.pop("request"))


def planned_images(table: pa.Table) -> list[PlannedImage]:
    """Returns the rows of a plan's Parquet file as images."""
    names = FIELDS.keys() | IMAGE_COLUMNS.keys()
    return [
        PlannedImage(
            request=from_columns({name: row.pop(name) for name in names & row.keys()}), **row
        )
        for row in table.to_pylist()
    ]
