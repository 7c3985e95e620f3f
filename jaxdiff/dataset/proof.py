"""The root of a finished dataset's proof: `_SUCCESS` names everything in it by content.

It has the SHA-256 of the plan's files, the reports and what pins the hardware; and for every
revision of every shard two digests: of what it holds, which is the same whenever the shard is made,
and of its done-marker, which also has the times. So whoever keeps the digest of `_SUCCESS` can
prove the dataset, and a shard that is made again can be held against what it was. The lists are
flat, not a tree: of 100,000 shards they take some 15 MB, and every shard that disagrees is named.

Earlier versions wrote only the plan's id, the counts and one digest of all shards.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from jaxdiff.dataset import names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.store import Store
from jaxdiff.errors import InputError

REPORTS = (names.CARD, names.CROISSANT, names.REPORT, names.REJECTED, names.FAILED)
PLAIN = (names.SUCCESS, *REPORTS, names.LOCK, names.DEVICE)  # files whose kind is checked here
UNFINISHED = (
    "was left by a job that did not end; run its command again, or delete the file if no other job "
    "is working here"
)
STRAY = "does not belong to the run; move it elsewhere"


@dataclass(frozen=True)
class Root:
    """The content of `_SUCCESS`.

    Attributes:
      plan_id: the plan's id.
      counts: of rows and images.
      files_sha256: the digest of all shards' files; equal for datasets of equal content.
      sha256: the digests of all other files, by name; None, as the rest, in an earlier version's.
      contents: the digest of what each shard holds.
      earlier: what earlier revisions of a shard held, by the shard's number.
      markers: the digests of the done-markers of each shard.
    """

    plan_id: str
    counts: dict[str, int]
    files_sha256: str
    sha256: dict[str, str] | None = None
    contents: list[str] | None = None
    earlier: dict[str, list[str]] | None = None
    markers: list[list[str]] | None = None

    def known(self, shard: int) -> list[str]:
        """Returns what each revision of a shard held, the last one last."""
        return [*self.earlier.get(str(shard), []), self.contents[shard]]

    def __str__(self) -> str:
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(said, indent=2, ensure_ascii=False) + "\n"


def read(store: Store) -> Root | None:
    """Returns the root of a dataset, or None if it is not finished.

    Raises:
      ValueError: if it cannot be read, or this version would write it in another way.
    """
    if store.kind(names.SUCCESS) == "is missing":
        return None
    try:
        content = store.read(names.SUCCESS).decode()
        root = Root(**json.loads(content))
        sound = str(root) == content and _is_sound(root)
    except (AttributeError, RecursionError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"{names.SUCCESS} differs from what the run wrote, so it proves nothing; to have it "
            f"written anew from the done-markers, delete it and run `jaxdiff verify "
            f"{store.address} --repair`"
        )
    return root


def _is_sound(root: Root) -> bool:
    digests = [root.files_sha256]
    if any(each is not None for each in (root.sha256, root.contents, root.earlier, root.markers)):
        digests += [*root.sha256.values(), *root.contents]
        for lists in (root.earlier.values(), root.markers):
            digests += [digest for revisions in lists for digest in revisions]
    return isinstance(root.counts, dict) and all(
        re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests
    )


def required(store: Store) -> Root | None:
    """Returns the root like `read`, but raises InputError: what it proved must not get lost."""
    try:
        return read(store)
    except ValueError as problem:
        raise InputError(f"{store.address}: {problem}") from None


def now(run: Run, markers: list[shards.Marker], counts: dict[str, int]) -> Root:
    """Returns the root of the files as they are; raises ValueError if a marker is damaged.

    Takes the word of the plan and the markers for the files that they name: `ledger` checks those.
    """
    contents = [[each.content for each in shards.read_markers(run, shard)] for shard in run.shards]
    named = {f"{names.PLAN}/{name}": digest for name, digest in run.plan.sha256.items()}
    return Root(
        plan_id=run.plan.id,
        counts=counts,
        files_sha256=files_sha256(markers),
        sha256=dict(sorted((named | _digests(run, names.PLAN_FILE, *REPORTS) | pins(run)).items())),
        contents=[revisions[-1] for revisions in contents],
        earlier={
            str(shard): revisions[:-1]
            for shard, revisions in enumerate(contents)
            if len(revisions) > 1
        },
        markers=[marker_digests(run, shard) for shard in run.shards],
    )


def files_sha256(markers: list[shards.Marker]) -> str:
    """Returns the digest of the lines "SHA-256  name" of all shards' files."""
    lines = (
        f"{file['sha256']}  {name}\n"
        for marker in markers
        for name, file in sorted(marker.files.items())
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def marker_digests(run: Run, shard: int) -> list[str]:
    """Returns the digest of each of a shard's done-markers."""
    return [digest_of(run.store, name) for name in shards.marker_names(run, shard)]


def pins(run: Run) -> dict[str, str]:
    """Returns the digests of the files that pin the run to its hardware, by name."""
    sizes = (f"{names.BATCH}/{entry}" for entry in run.store.entries(names.BATCH))
    return _digests(run, names.DEVICE, *sizes)


def _digests(run: Run, *every: str) -> dict[str, str]:
    """Returns the digests of those of some files that exist."""
    return {
        name: digest_of(run.store, name) for name in every if run.store.kind(name) != "is missing"
    }


def digest_of(store: Store, name: str) -> str:
    """Returns the SHA-256 (hex) of a small plain file, and "" for all else."""
    return "" if store.kind(name) else hashlib.sha256(store.read(name)).hexdigest()


def digest(text: str) -> str:
    """Returns the SHA-256 (hex) of the file that `store.swap` writes for a text."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def is_in_markers(root: Root, run: Run) -> bool:
    """Returns whether a root of an earlier version says no more than the done-markers do."""
    try:
        markers = [shards.read_marker(run, shard) for shard in run.shards]
    except ValueError:
        return False
    is_old = root.contents is None and None not in markers
    return is_old and root.files_sha256 == files_sha256(markers)


def has_its_report(root: Root, run: Run) -> bool:
    """Returns whether `run.json` and the done-markers that it is made of are the root's."""
    return (
        root.sha256 is not None
        and root.sha256.get(names.REPORT) == digest_of(run.store, names.REPORT)
        and root.markers == [marker_digests(run, shard) for shard in run.shards]
    )


def plan_problem(root: Root, run: Run) -> str | None:
    """Returns how the plan differs from the one that the root records, or None."""
    if root.plan_id != run.plan.id:
        return f"{names.SUCCESS} belongs to another plan than {names.PLAN_FILE}"
    if root.sha256 and root.sha256.get(names.PLAN_FILE) != digest_of(run.store, names.PLAN_FILE):
        return f"{names.PLAN_FILE} differs from what the run wrote"
    if root.contents is not None and not len(root.contents) == len(root.markers) == len(run.shards):
        return f"{names.SUCCESS} has another number of shards than {names.PLAN_FILE}"
    return None


def differences(root: Root, here: Root) -> list[str]:
    """Returns how a dataset differs from its root, given the root of the files as they are."""
    if root.contents is None:
        here = Root(here.plan_id, here.counts, here.files_sha256)
    if str(root) == str(here):
        return []
    return [*_named(root, here)] or [f"{names.SUCCESS} differs from what the run wrote"]


def _named(root: Root, here: Root) -> Iterator[str]:
    if root.counts != here.counts:
        yield f"{names.SUCCESS} has other counts than the shards"
    if root.contents is None:
        if root.files_sha256 != here.files_sha256:
            yield f"{names.DONE} does not have the shards that {names.SUCCESS} records"
        return
    for name in sorted(root.sha256.keys() | here.sha256.keys()):
        if name not in root.sha256:
            yield f"{name} {STRAY}"
        elif name not in here.sha256:
            if name not in REPORTS:  # the ledger says so
                yield f"{name} is missing"
        elif root.sha256[name] != here.sha256[name]:
            yield f"{name} differs from what the run wrote"
    for shard in range(len(here.contents)):
        if root.known(shard) != here.known(shard):
            yield f"shard {shard} is not the one that {names.SUCCESS} records"
        elif root.markers[shard] != here.markers[shard]:
            yield f"the done-marker of shard {shard} differs from what the run wrote"


def differences_of_pins_and_markers(root: Root, run: Run) -> Iterator[str]:
    """Yields how what must not be made again differs: pins, and the done-markers that exist."""
    if root.sha256 is None:
        return
    here, is_pin = pins(run), (names.DEVICE, f"{names.BATCH}/")
    pinned = {name: value for name, value in root.sha256.items() if name.startswith(is_pin)}
    for name in sorted(pinned.keys() | here.keys()):
        if pinned.get(name) != here.get(name):
            yield f"{name} differs from what {names.SUCCESS} records"
    for shard in run.shards:
        found = marker_digests(run, shard)
        if found and found != root.markers[shard]:
            yield f"the done-markers of shard {shard} differ from what {names.SUCCESS} records"


def disagreement(root: Root, here: Root, reports: dict[str, str]) -> str | None:
    """Returns how a dataset whose shards were made again differs from its root, or None.

    A shard may hold what an earlier revision of it did, since signatures differ every time. Then
    the counts and the reports follow the shards.

    Args:
      here: the root of the files as they are.
      reports: the digests of the reports to write.
    """
    if root.contents is None:
        return next(iter(differences(root, here)), None)
    for shard, content in enumerate(here.contents):
        if content not in root.known(shard):
            return f"shard {shard} is not the one that {names.SUCCESS} records"
    if here.contents == root.contents:
        here = replace(here, sha256=here.sha256 | reports)
    else:
        said = {name: root.sha256.get(name, "") for name in reports}
        here = replace(here, sha256=here.sha256 | said, counts=root.counts)
        here = replace(here, files_sha256=root.files_sha256)
    said = {names.REPORT: root.sha256.get(names.REPORT, "")}  # it has a clock
    here = replace(here, sha256=dict(sorted((here.sha256 | said).items())), markers=root.markers)
    here = replace(here, contents=root.contents, earlier=root.earlier)
    return next(iter(differences(root, here)), None)


def misplaced_folders(store: Store) -> Iterator[str]:
    """Yields which of a dataset's folders are links, which nothing follows, or no folders."""
    for name in names.FOLDERS:
        why = store.kind(name, folder=True)
        if why not in (None, "is missing"):
            yield f"{name} {why}; put the folder that the run wrote in its place"


def strays(
    run: Run,
    markers: Sequence[shards.Marker | None],
    folders: Sequence[str] = ("", *names.FOLDERS),
) -> Iterator[str]:
    """Yields the files that do not belong to the run, and reports that are no plain files.

    In the directory itself, names that begin with "." are left alone (a clone from the Hub has
    some), and what other tools of ours write there; in `names.TMP`, lost processes still may.
    """
    owned = dict.fromkeys((*names.FOLDERS, *names.OURS, names.LOCK, names.PLAN_FILE, *pins(run)))
    owned |= dict.fromkeys(f"{names.PLAN}/{name}" for name in run.plan.sha256)
    for marker in filter(None, markers):
        done = (shards.marker_name(marker.shard, n) for n in range(marker.revision + 1))
        owned |= dict.fromkeys((*marker.files, *done))
    del owned[names.OLD]  # of a job that has not ended
    for folder in folders:
        if folder in (names.TMP, names.OLD):
            continue
        for entry in run.store.entries(folder):
            name = f"{folder}/{entry}" if folder else entry
            if not folder and (entry.startswith(".") or entry in names.BESIDE):
                continue
            if name not in owned:
                yield f"{name} {UNFINISHED if names.HASHED.fullmatch(entry) else STRAY}"
            elif name in PLAIN and (why := run.store.kind(name)):
                yield f"{name} {why}"
