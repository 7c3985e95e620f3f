"""`jaxdiff verify --repair`: remakes a damaged dataset's shards with identical bytes."""

import contextlib
from pathlib import Path

from jaxdiff.dataset import ledger
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from pipelines import runners
from pipelines.generate import GenerateShard, make_shards
from pipelines.generate_options import Models, Workers
from pipelines.jobs import StoppedError, stopped_by_signals


def repair(directory: Path) -> bool:
    """Remakes damaged and missing shards, and rewrites the reports.

    Returns:
      False if a signal stopped it. `ledger.verify` reports what is still wrong.

    Raises:
      InputError: if there is no run, its plan is damaged or its model can no longer be found.
    """
    store = open_run(directory).store
    with store.held(), stopped_by_signals():
        run = open_run(directory)
        work = (run, Models(**run.plan.models), Workers())
        runner = runners.choose([], 1)
        try:
            while broken := ledger.broken(run):
                make_shards(GenerateShard(*work, "repair"), run.plan, broken, runner)
                broken = ledger.broken(run)
                revised = ledger.revised(run, broken)
                for shard in revised:  # a signature differs every time
                    shards.forget(run, shard)
                    print(f"shard {shard} is remade as it was before signing: sign it again")
                if not revised:
                    break
            for shard in broken:
                print(
                    f"shard {shard} was remade, but its bytes differ from what its marker records "
                    "(perhaps because of other hardware or versions); to accept the new bytes, "
                    f"delete {store.path(shards.marker_name(shard))} and repair again"
                )
            make_shards(GenerateShard(*work, "make"), run.plan, ledger.todo(run), runner)
        except StoppedError:
            return False
        with contextlib.suppress(ledger.IncompleteError):  # for instance, because of foreign files
            ledger.finalize(run, 0.0)
    return True
