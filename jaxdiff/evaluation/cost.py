"""Counts what the images of a dataset cost: by counting, not by a clock, so reports stay equal."""

from jaxdiff.dataset.run import Run
from jaxdiff.families import operations
from jaxdiff.families.ensemble import Ensemble


def of_image(run: Run, ensemble: Ensemble) -> dict[str, str]:
    """Returns the average cost of an image of a dataset, as settings for a report.

    Args:
      run: the dataset.
      ensemble: the model that made it.

    Returns:
      the evaluations of denoisers and the floating-point operations of an image, as text by name.
    """
    settings, kinds = run.plan.settings, run.kinds()
    evaluations = work = 0
    for request, count in kinds.items():
        work += count * operations.of_image(ensemble, settings, request.bucket)
        for steps in ensemble.passes(settings, request.bucket) if ensemble.samples else ():
            whole = sum(each for each, _ in operations.evaluations(ensemble, settings, steps))
            evaluations += count * whole
    images = sum(kinds.values())
    return {
        "evaluations per image": f"{evaluations / images:g}",
        "operations per image": f"{work / images:.2e}",
    }
