"""Making a damaged dataset's shards again, each to the bytes that it had: `verify --repair`."""

import contextlib
from pathlib import Path

from jaxdiff.dataset import ledger
from jaxdiff.dataset import local as layout
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.errors import InputError
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
    plan = plans.load(directory)
    if plan is None:
        raise InputError(f"{directory} holds no jaxdiff run")
    with layout.held(directory), stopped_by_signals():
        work = (plan, directory, Models(**plan.models), Workers())
        runner = runners.choose([], 1)
        try:
            while broken := ledger.broken(directory, plan):
                make_shards(GenerateShard(*work, "repair"), plan, broken, runner)
                broken = ledger.broken(directory, plan)
                revised = ledger.revised(directory, plan, broken)
                for shard in revised:  # a signature is never the same twice
                    shards.forget(directory, shard)
                    print(f"shard {shard} is made as it was before it was signed: sign it again")
                if not revised:
                    break
            for shard in broken:
                print(
                    f"shard {shard} was made again, but not to the bytes that its marker names, as "
                    "other hardware or other versions do; to delete "
                    f"{shards.marker_path(directory, shard)} lets it be made anew"
                )
            make_shards(GenerateShard(*work, "make"), plan, ledger.todo(directory, plan), runner)
        except StoppedError:
            return False
        with contextlib.suppress(ledger.IncompleteError):  # somebody else's files
            ledger.finalize(directory, plan, 0.0)
    return True
