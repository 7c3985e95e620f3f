"""Opens the checkpoints that make an image together, and checks that they fit. Imports no JAX."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checkpoint import lora as loras
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.controlnet import open_controlnet, scaled, split_number
from jaxdiff.checkpoint.ip_adapter import open_ip_adapter
from jaxdiff.checkpoint.weight_files import NoVariantError
from jaxdiff.checks import BadValueError
from jaxdiff.errors import InputError
from jaxdiff.families import image_inputs, open_checkpoint
from jaxdiff.families import second_pass as second_passes
from jaxdiff.families.ensemble import Addition, Ensemble, Upscaling
from jaxdiff.families.second_pass import SecondPass
from jaxdiff.families.upscaler import UPSCALER

# The models that take what an option names.
WORKS_WITH = {
    image_inputs.CONTROLS: "Stable Diffusion 1, 2 and XL, FLUX.1 dev and schnell",
    image_inputs.ADAPTERS: "Stable Diffusion 1, 2 and XL",
}


def open_ensemble(
    model: str | Path,
    variant: str | None = None,
    refiner: str | Path | None = None,
    lora: Sequence[str] = (),
    base: str | Path | None = None,
    controlnet: Sequence[str] = (),
    ip_adapter: Sequence[str] = (),
    upscale: str | Path | None = None,
) -> Ensemble:
    """Opens a model and, if given, what is used with it: a refiner, LoRAs and so on.

    Args:
      model, variant, base: as in `open_checkpoint`. The model must have the variant; a refiner
        without it uses its default weights.
      refiner: a second model for the same latents, which takes the last steps (Podell et al., 2023,
        arXiv:2307.01952, 2.5).
      lora: LoRAs to add to the model's weights, as in `lora.adapted`.
      controlnet: each "DIR" or "DIR:SCALE".
      ip_adapter: each "FILE.safetensors" or "FILE.safetensors:SCALE".
      upscale: "MODEL" or "MODEL:FACTOR", an upscaler and by how much it enlarges the images; or
        "latent:FACTOR" or "latent:FACTOR,strength=S", as in `SecondPass`.

    Raises:
      InputError: if one of them cannot be read, or they do not fit together.
    """
    first = open_checkpoint(model, variant, base)
    if first.defaults.base_needed:
        raise InputError(
            f"model {str(model)!r} is a refiner; use a base model, and this one as --refiner"
        )
    if lora and first.family is UPSCALER:
        raise InputError(f"--lora has no effect on {first.defaults.name}; leave it out")
    first = loras.adapted(first, lora)
    second_pass = _second_pass(first, upscale)
    return Ensemble(
        base=first,
        refiner=None if refiner is None else _refiner(first, refiner, variant),
        controls=_controls(first, controlnet),
        adapters=_adapters(first, ip_adapter),
        upscaler=_upscaling(first, None if second_pass else upscale),
        second_pass=second_pass,
    )


def _controls(base: Checkpoint, said: Sequence[str]) -> tuple[Addition, ...]:
    """Opens the ControlNets that steer the base."""
    check = base.family.check_controlnet
    _refuse_unknown(base, image_inputs.CONTROLS, said, check)
    controls = tuple(
        _addition(each, open_controlnet, lambda net: check(base, net.config)) for each in said
    )
    if len({net.files.kinds is None for net in controls}) > 1:
        raise InputError(
            f"{image_inputs.CONTROLS}: union ControlNets cannot be used together with others; use "
            "only one of these kinds in a job"
        )
    return controls


def _adapters(base: Checkpoint, said: Sequence[str]) -> tuple[Addition, ...]:
    """Opens the IP-Adapters that show the base image prompts."""
    check = base.family.check_ip_adapter
    _refuse_unknown(base, image_inputs.ADAPTERS, said, check)
    return tuple(
        _addition(each, open_ip_adapter, lambda adapter: check(base, adapter.context_width))
        for each in said
    )


def _refuse_unknown(
    base: Checkpoint, option: str, said: Sequence[str], check: Callable | None
) -> None:
    if said and check is None:
        raise InputError(
            f"{option} works with {WORKS_WITH[option]} only, not with {base.defaults.name}; "
            "leave it out"
        )


def _refiner(base: Checkpoint, said: str | Path, variant: str | None) -> Checkpoint:
    """Opens the model that takes the last steps."""
    takes = base.family.image_inputs(base)
    if takes is not None and takes.needed:
        raise InputError(
            f"--refiner cannot continue what {base.defaults.name} begins, because it would not "
            "see the image of the row; leave it out"
        )
    try:
        refiner = open_checkpoint(said, variant)
    except NoVariantError:
        refiner = open_checkpoint(said)
    ours, theirs = base.defaults.latents, refiner.defaults.latents
    for what in ours:
        if ours[what] != theirs.get(what):
            raise InputError(
                f"--refiner {str(said)!r} has different latents from the model "
                f"({what} {theirs.get(what)}, not {ours[what]}); use the refiner of this model"
            )
    return refiner


def _second_pass(base: Checkpoint, said: str | Path | None) -> SecondPass | None:
    """Reads how the base denoises enlarged latents again; returns None if it does not."""
    if said is None or not second_passes.is_asked(str(said)):
        return None
    takes = base.family.image_inputs(base)
    edits = takes is not None and (takes.needed or takes.masked_strength is None)
    if base.family.sees_control or edits:
        raise InputError(
            f"--upscale latent needs a model that makes images of text alone, which "
            f"{base.defaults.name} is not; use a GAN upscaler, such as shapes64-x4"
        )
    try:
        return second_passes.parse(str(said))
    except BadValueError as problem:
        raise InputError(str(problem)) from None


def _upscaling(base: Checkpoint, said: str | Path | None) -> Upscaling | None:
    """Opens what enlarges the images that the base makes; returns None if nothing does."""
    if base.family is UPSCALER:
        if said is not None:
            raise InputError("--upscale: the model is itself an upscaler; leave one of them out")
        return Upscaling(base, base.defaults.factor)
    if said is None:
        return None
    path, number = split_number(str(said))
    upscaler = open_checkpoint(path)
    if upscaler.family is not UPSCALER:
        raise InputError(
            f"--upscale {path} is {upscaler.defaults.name}; use a GAN upscaler, such as shapes64-x4"
        )
    scale = upscaler.defaults.factor
    if number is None:
        return Upscaling(upscaler, scale)
    try:
        return Upscaling(upscaler, checks.number(f"--upscale {said}: the factor", number, 1, scale))
    except BadValueError as problem:
        raise InputError(str(problem)) from None


def _addition(said: str, open_files: Callable, check: Callable) -> Addition:
    path, scale = scaled(said)
    files = open_files(path)
    try:
        check(files)
    except InputError as problem:
        raise InputError(f"{files.path}: {problem}") from problem
    return Addition(files, scale)
