"""DreamBooth's class images (Ruiz et al., 2023, arXiv:2208.12242, 3.3), which preserve the class.

`jaxdiff generate`'s job makes them before training starts, so they form a dataset like any other:
resumable, and complete when its files prove it.
"""

import json
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.training.batches import IMAGES
from jaxdiff.training.recipe import Prior
from pipelines import generate_options
from pipelines.jobs import EXIT_OK, EXIT_SOME_IMAGES_FAILED


def class_images(model: str, prior: Prior, folder: Path) -> None:
    """Generates the missing images of the class, as a dataset in `folder / IMAGES`.

    Call it before this process holds an accelerator: other processes make the images. Images that
    could not be made are missing from the dataset.

    Args:
      model: as for `jaxdiff generate --model`; its defaults set the size, steps and guidance.
      prior: the prompt and the number of images.
      folder: the training run's folder for class images.

    Raises:
      InputError: if the model does not exist, or the prompt cannot be used.
      SystemExit: with the job's exit code, if the job failed part-way or was stopped by a signal;
        the job has printed the reason, and the next call continues.
    """
    from pipelines import generate  # imported late: only here does training need Beam

    if not model:
        raise InputError("prior: the recipe has no model to generate the class images with")
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
