"""Turns prompts and settings into requests, each with a seed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

from jaxdiff import checks
from jaxdiff.errors import InputError, suggestion
from jaxdiff.request import Request, derived_seed

JOB_SEED = 0  # the default of `jaxdiff generate --seed`
SETTINGS = tuple(field.name for field in fields(Request) if field.name != "prompt")


def requests(
    prompts: str | Request | Iterable[str | Request], num_images: int, settings: Mapping
) -> Iterator[Request]:
    """Yields a request for each of several images of each prompt.

    Prompts without a seed get those that `jaxdiff generate` gives to the rows of a manifest that
    holds them; with a seed, their images have that one and the following ones.

    Args:
      prompts: consumed as needed.
      num_images: images per prompt.
      settings: fields of `Request` by name, for those that a prompt leaves open.

    Raises:
      InputError: naming the argument that cannot be used.
    """
    if unknown := [name for name in settings if name not in SETTINGS]:
        name, *_ = unknown
        raise InputError(f"unknown setting {name}{suggestion(name, SETTINGS)}")
    try:
        num_images = checks.integer("num_images", num_images, 1, checks.MAX_IMAGES)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None
    if isinstance(prompts, str | Request):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts must be texts or jaxdiff.Requests, not {checks.shown(prompts)}")
    return (
        replace(request, seed=_seed(request, number, index))
        for number, request in enumerate(_request(prompt, settings) for prompt in prompts)
        for index in range(num_images)
    )


def each(requests: Sequence[Request], field: str, argument: str, values) -> list[Request]:
    """Returns the requests, each with its own value of a field.

    Raises:
      InputError: naming the argument, unless it has a value for each request.
    """
    values = [*values] if isinstance(values, Iterable) else [values]
    if len(values) != len(requests):
        raise InputError(
            f"{argument} must have one value for each of {len(requests)} images, not {len(values)}"
        )
    pairs = zip(requests, values, strict=True)
    return [replace(request, **{field: value}) for request, value in pairs]


def _request(prompt: str | Request, settings: Mapping) -> Request:
    if isinstance(prompt, str):
        return Request(prompt=prompt, **settings)
    if not isinstance(prompt, Request):
        raise InputError(f"a prompt must be text or a jaxdiff.Request, not {checks.shown(prompt)}")
    open_fields = (name for name in settings if _is_open(getattr(prompt, name)))
    return replace(prompt, **{name: settings[name] for name in open_fields})


def _is_open(value) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _seed(request: Request, number: int, index: int) -> int:
    if request.seed is None:
        return derived_seed(JOB_SEED, str(number), index)
    return request.seed + index
