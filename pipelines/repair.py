"""`jaxdiff verify --repair`: remakes what disagrees with a dataset's root, with identical bytes.

`_SUCCESS` stays the root. A shard whose done-marker is the root's is remade with the bytes that the
marker names. A done-marker that is not the root's proves nothing: its shard is made anew, and must
hold what the root records; otherwise everything is put back. Without `_SUCCESS`, the dataset is not
finished, and the done-markers are all there is.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from jaxdiff.dataset import ledger, names, proof
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.aside import Aside
from jaxdiff.dataset.proof import Root
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.dataset.store import local
from pipelines import runners, supervisor
from pipelines.generate_options import Models, Workers
from pipelines.jobs import StoppedError, stopped_by_signals
from pipelines.shard_job import GenerateShard, make_shards


def repair(where: str | Path) -> bool:
    """Remakes damaged and missing shards, and rewrites the reports.

    Returns:
      False if a signal stopped it. `ledger.verify` reports what is still wrong.

    Raises:
      InputError: if there is no run, its plan is damaged or its model can no longer be found; or
        if it is in a bucket.
    """
    store = open_run(local(where, "--repair")).store
    with store.held(), stopped_by_signals():
        run = open_run(store)
        ledger.check_plan(run)
        root = proof.required(store)
        if root and proof.is_in_markers(root, run):
            root = None  # they stand for it, shard by shard
        try:
            with supervisor.closed_afterwards():
                refused = _remake(run, root)
        except StoppedError:
            return False
        for shard in refused:
            print(
                f"shard {shard} was remade, but its bytes differ from what {names.SUCCESS} and its "
                "marker record (perhaps because of other hardware or versions), so nothing was "
                "changed; to accept the new bytes, delete both "
                f"({store.path(names.SUCCESS)}, {store.path(shards.marker_name(shard))}) and "
                "repair again"
            )
        if refused:
            return True
        if root and (problem := ledger.disagreement(run, root)):
            print(f"{problem}, and it cannot be made again; {names.SUCCESS} is left as it was")
            return True
        with contextlib.suppress(ledger.IncompleteError):  # for instance, because of foreign files
            ledger.finalize(run, 0.0, root)
    return True


def _remake(run: Run, root: Root | None) -> list[int]:
    """Remakes what is damaged or missing; returns the shards that came out with other bytes."""
    generate = partial(GenerateShard, run, Models(**run.plan.models), Workers())
    runner = runners.choose([], 1)
    refused: list[int] = []
    asides = [Aside(run, shard, wanted) for shard, wanted in list(_distrusted(run, root))]
    vouched = root is None or root.contents is not None
    try:
        ledger.settle(run)
        broken = ledger.broken(run)
        make_shards(generate("repair"), run.plan, broken, runner)
        for shard in set(ledger.broken(run)) & set(broken):
            markers = shards.read_markers(run, shard)
            if len(markers) > 1:  # a signature differs every time
                asides.append(Aside(run, shard, [marker.content for marker in markers]))
            else:
                refused.append(shard)
        make_shards(generate("make"), run.plan, ledger.todo(run), runner)
        vouched = vouched or not ledger.disagreement(run, root)
    finally:
        for aside in asides:
            if vouched and aside.is_replaced():
                aside.drop()
            else:
                aside.put_back()
                refused.append(aside.shard)
    for aside in asides:
        if aside.shard not in refused and aside.is_reverted():
            print(f"shard {aside.shard} is remade as it was before signing: sign it again")
    return sorted(refused)


def _distrusted(run: Run, root: Root | None) -> Iterator[tuple[int, list[str]]]:
    """Yields the shards whose done-markers prove nothing, and what the root says they held."""
    for shard in run.shards:
        try:
            is_readable, is_made = True, bool(shards.read_markers(run, shard))
        except ValueError:
            is_readable = is_made = False
        if root and root.contents is not None:
            if not is_made or root.markers[shard] != proof.marker_digests(run, shard):
                yield shard, root.known(shard)
        elif not is_readable:
            yield shard, []
