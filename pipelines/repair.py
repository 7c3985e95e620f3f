"""Making a damaged dataset's shards again, each to the bytes that it had: `verify --repair`."""

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
    """Makes what is damaged or missing again, and writes the reports anew.

    Returns:
      False if a signal stopped it; what is right then is for `ledger.verify` to say.

    Raises:
      InputError: if there is no run, its plan is damaged or its model cannot be found any more.
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
                for shard in revised:  # a signature is never the same twice
                    shards.forget(run, shard)
                    print(f"shard {shard} is made as it was before it was signed: sign it again")
                if not revised:
                    break
            for shard in broken:
                print(
                    f"shard {shard} was made again, but not to the bytes that its marker names, as "
                    "other hardware or other versions do; to delete "
                    f"{store.path(shards.marker_name(shard))} lets it be made anew"
                )
            make_shards(GenerateShard(*work, "make"), run.plan, ledger.todo(run), runner)
        except StoppedError:
            return False
        with contextlib.suppress(ledger.IncompleteError):  # somebody else's files
            ledger.finalize(run, 0.0)
    return True
