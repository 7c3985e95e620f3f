"""The report of `jaxdiff inspect`, from a checkpoint's files without its weights."""

from collections.abc import Callable, Collection, Iterable, Sequence

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.safetensors_header import ITEM_BYTES
from jaxdiff.checkpoint.tensors import FLOATS, StoredTensor
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError
from jaxdiff.families.family import EMBEDDED, UNGUIDED
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint
from jaxdiff.families.upscaler import UPSCALER

HEADINGS = ("component", "class", "parameters", "stored as", "size", "file")
SIGMAS = ("Karras", "exponential", "beta")


def report(checkpoint: Checkpoint) -> str:
    """Returns a checkpoint's family, networks, defaults and fingerprint as aligned lines of text.

    The last line tells whether the networks and the tokenizers can be made. Of the weights, only
    headers are read, except for the fingerprint, which reads every byte once.

    Raises:
      InputError: if a required value is not valid. An optional default that is missing is reported
        in its own line instead.
    """
    weights = [(network, checkpoint.weights(network)) for network in checkpoint.networks]
    every = [tensor for _, tensors in weights for tensor in tensors.values()]
    networks = [
        HEADINGS,
        *(_network(checkpoint, network, tensors) for network, tensors in weights),
        ("total", "", _parameters(every), _dtypes(every), _size(every), ""),
    ]
    lines = [
        f"{checkpoint.name}: {checkpoint.defaults.name} ({checkpoint.pipeline})",
        f"{checkpoint.path}",
        "",
        *_aligned(networks, right=(2, 4)),
        "",
        *_aligned(_facts(checkpoint)),
    ]
    return "\n".join(map(checks.printable, lines))


def _network(
    checkpoint: Checkpoint, network: str, weights: dict[str, StoredTensor]
) -> tuple[str, ...]:
    tensors = weights.values()
    files = {tensor.file.name for tensor in tensors}
    return (
        network,
        checkpoint.index[network][1],
        _parameters(tensors),
        _dtypes(tensors),
        _size(tensors),
        files.pop() if len(files) == 1 else f"{len(files)} files",
    )


def _facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    known = [("fingerprint", checkpoint.fingerprint), ("usable", _usable(checkpoint))]
    if checkpoint.family is UPSCALER:
        return [("enlarges", f"{checkpoint.defaults.factor} times"), *known]
    return [
        ("prediction", _prediction(checkpoint.defaults.scheduler)),
        ("scheduler", _scheduler(checkpoint.defaults.scheduler)),
        ("default sampler", _or_reason(lambda: _sampler(checkpoint))),
        ("default steps", f"{checkpoint.defaults.steps}"),
        ("default guidance", _guidance(checkpoint)),
        ("default size", _or_reason(lambda: _default_size(checkpoint))),
        ("latent channels", f"{checkpoint.defaults.latent_channels}"),
        *(_tokenizer(checkpoint, encoder) for encoder in checkpoint.text_encoders),
        *known,
    ]


def _prediction(scheduler: dict) -> str:
    predicted = scheduler_config.prediction_type(scheduler)
    zero = scheduler.get("rescale_betas_zero_snr")
    return _brief(predicted) + ", zero terminal SNR" * (bool(zero) and predicted != "flow")


def _scheduler(scheduler: dict) -> str:
    parts = [
        _brief(scheduler.get("_class_name")),
        f"{_brief(scheduler.get('num_train_timesteps', 1000))} timesteps",
    ]
    if scheduler_config.is_flow(scheduler):
        shift = _brief(scheduler.get("shift", scheduler.get("flow_shift", 1.0)))
        is_dynamic = scheduler.get("use_dynamic_shifting")
        parts.append("shift by image size" if is_dynamic else f"shift {shift}")
    elif "timestep_spacing" in scheduler:
        parts.append(f"{_brief(scheduler['timestep_spacing'])} spacing")
    parts += [f"{kind} sigmas" for kind in SIGMAS if scheduler.get(f"use_{kind.lower()}_sigmas")]
    return ", ".join(parts)


def _sampler(checkpoint: Checkpoint) -> str:
    defaults = checkpoint.defaults
    scheduler_config.noise_schedule(defaults.scheduler, defaults.sampler)
    return defaults.sampler


def _usable(checkpoint: Checkpoint) -> str:
    from jaxdiff.families.model import networks_of  # imports JAX
    from jaxdiff.weights.load import refuse_misfits

    try:
        model = networks_of(checkpoint)
        for name, network in model.networks.items():
            refuse_misfits(network.shapes, checkpoint.weights(name))
        of_checkpoint(checkpoint)
    except InputError as error:
        return f"no: {error}"
    return "yes"


def _guidance(checkpoint: Checkpoint) -> str:
    defaults = checkpoint.defaults
    if defaults.guidance == UNGUIDED:
        return "none, because it was distilled"
    takes = checkpoint.family.image_inputs(checkpoint)
    said = f"{defaults.guidance_scale:g}"
    if takes is not None and takes.guidance_scale is not None:
        said += f", and {takes.guidance_scale:g} for the image"
    return said + ", an input of the denoiser" * (defaults.guidance == EMBEDDED)


def _default_size(checkpoint: Checkpoint) -> str:
    width, height = checkpoint.defaults.size
    multiple = checkpoint.defaults.size_multiple
    return f"{width} x {height} px, or other multiples of {multiple} px"


def _tokenizer(checkpoint: Checkpoint, encoder: str) -> tuple[str, str]:
    def described() -> str:
        folder, config = checkpoint.tokenizer(encoder), checkpoint.config(encoder)
        tokenizer = checkpoint.family.tokenizer(encoder, folder, config)
        return f"{tokenizer.tokens} tokens, vocabulary of {len(tokenizer)}"

    return encoder.replace("text_encoder", "tokenizer"), _or_reason(described)


def _brief(value: object) -> str:
    """Returns a value of a config, which has not been read strictly, in few characters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _or_reason(value: Callable[[], str]) -> str:
    """Returns an optional value, or the reason why the checkpoint has none."""
    try:
        return value()
    except InputError as error:
        return f"none: {error}"


def _parameters(tensors: Iterable[StoredTensor]) -> str:
    return _short(sum(tensor.size for tensor in tensors), {1e6: "M", 1e3: "k"}, "")


def _size(tensors: Iterable[StoredTensor]) -> str:
    stored = sum(tensor.size * ITEM_BYTES[tensor.dtype] for tensor in tensors)
    return _short(stored, {1e9: " GB", 1e6: " MB", 1e3: " kB"}, " B")


def _dtypes(tensors: Iterable[StoredTensor]) -> str:
    found = {tensor.dtype for tensor in tensors}
    return ", ".join(sorted(FLOATS[dtype].name if dtype in FLOATS else dtype for dtype in found))


def _short(number: float, units: dict[float, str], unit: str) -> str:
    """Abbreviates a number, for example to 859.5M; the units are ordered from large to small."""
    for factor, name in units.items():
        if number >= factor:
            return f"{number / factor:.1f}{name}"
    return f"{number}{unit}"


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Formats rows as lines of aligned columns; the columns in `right` are right-aligned."""
    rows = [[cell if cell.isprintable() else ascii(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
