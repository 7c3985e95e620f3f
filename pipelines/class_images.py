"""DreamBooth's class images (Ruiz et al., 2023, arXiv:2208.12242, 3.3): what a model knows already.

They are made before training starts, by the job behind `jaxdiff generate`, so they are a dataset
like others: resumable, and complete when its files prove it.
"""

import json
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.training.batches import IMAGES
from jaxdiff.training.recipe import Prior
from pipelines import generate_options
from pipelines.jobs import EXIT_OK, EXIT_SOME_IMAGES_FAILED


def class_images(model: str, prior: Prior, folder: Path) -> None:
    """Makes images of the class, or those that are still to be made.

    Call it before this process holds an accelerator: other processes make the images.

    Args:
      model: as for `jaxdiff generate --model`, which decides size, steps and guidance.
      prior: what the images show, and how many there are.
      folder: the run's own place for them.

    They are a dataset in its `IMAGES`; those that could not be made are missing there.

    Raises:
      InputError: if there is no such model, or nothing can be made of the prompt.
      SystemExit: with the job's exit code, if it failed part-way or was stopped by a signal, which
        it has said; the next call continues.
    """
    from pipelines import generate  # late: only here does training need Beam

    if not model:
        raise InputError("prior: the recipe names no model that could make the class's images")
    folder.mkdir(parents=True, exist_ok=True)
    manifest, images = folder / "prompts.jsonl", folder / IMAGES
    row = {"prompt": prior.prompt, "num_images": prior.images}
    manifest.write_text(json.dumps(row) + "\n", encoding="utf-8")
    job = generate_options.Job(
        manifest=str(manifest), output=images, models=generate_options.Models(model), settings={}
    )
    code = generate.run(job, [])
    if code not in (EXIT_OK, EXIT_SOME_IMAGES_FAILED):
        raise SystemExit(code)
