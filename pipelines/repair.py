"""Making a damaged dataset's shards again, each to the bytes that it had: `verify --repair`."""

import contextlib
from pathlib import Path

from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import ledger
from jaxdiff.dataset import plan as plans
from jaxdiff.errors import InputError
from pipelines import runners
from pipelines.generate import GenerateShard, make_shards, stopped_by_signals
from pipelines.images import StoppedError
from pipelines.options import Models, Workers


def repair(directory: Path) -> bool:
    """Makes what is damaged or missing again, and writes the reports anew.

    Returns:
      False if a signal stopped it; what is right then is for `ledger.verify` to say.

    Raises:
      InputError: if there is no run, if its plan is damaged or its model cannot be found any more,
        or if a shard does not come out with the bytes that its marker names.
    """
    plan = plans.load(directory)
    if plan is None:
        raise InputError(f"{directory} holds no jaxdiff run")
    with layout.held(directory), stopped_by_signals():
        broken = ledger.broken(directory, plan)
        work = (plan, directory, Models(**plan.models), Workers())
        runner = runners.choose([], 1)
        try:
            make_shards(GenerateShard(*work, "repair"), plan, broken, runner)
            make_shards(GenerateShard(*work, "make"), plan, ledger.todo(directory, plan), runner)
        except StoppedError:
            return False
        with contextlib.suppress(ledger.IncompleteError):  # somebody else's files
            ledger.finalize(directory, plan, 0.0)
    return True
