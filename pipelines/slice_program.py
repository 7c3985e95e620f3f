"""The process that compiles a job's program for a slice, or for GPUs, which need not exist.

    python -m pipelines.slice_program

Reads a `Task` from standard input and writes its account, or why there is none, to standard output,
each as a line of JSON.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxdiff.dataset import plan as plans
from jaxdiff.devices import batching, gpus, program_text, slices
from jaxdiff.errors import InputError
from jaxdiff.request import Options
from pipelines.generate_options import Models

if TYPE_CHECKING:
    import jax

    from jaxdiff.engine.engine import TextToImage

GIB = 2**30


@dataclass(frozen=True)
class Task:
    """A program to compile.

    Attributes:
      models: the arguments of `Models`.
      options: the fields of `Options`.
      row: the bucket's values of `plan.BUCKET_COLUMNS`.
      target: the slice, as on the command line.
      batch_size: of each chip along `data`; None looks for the largest that fits.
      most: the largest that is tried.
    """

    models: dict
    options: dict
    row: dict
    target: str
    batch_size: int | None = None
    most: int = batching.MOST


def account(task: Task) -> dict:
    """Compiles the program for one host's chips and describes what came out, as JSON can.

    Returns:
      the `batch_size`, and if it does not fit, why it is `too_large`; else the `bytes` of each chip
      by what they are for, the numbers of `exchanges` by kind and the bytes `exchanged`, the number
      of `kernels`, and the `cycles`.

    Raises:
      InputError: if libtpu cannot be used, or the model, the options and the mesh do not go
        together.
    """
    import jax

    from jaxdiff.devices import compilation
    from jaxdiff.engine.engine import TextToImage
    from jaxdiff.engine.program import SAMPLING

    where = slices.parse(task.target)
    model = TextToImage(Models(**task.models).open(), Options(**task.options), described(where))
    request = model.resolve(plans.example(task.models, **task.row))
    programs, failures = {}, {}

    def memory(size: int) -> int:
        try:
            programs[size] = model.compiled(request, size)
            return sum(_bytes(programs[size], model).values())
        except jax.errors.JaxRuntimeError as problem:
            failures[size] = str(problem).splitlines()[0]
            return compilation.without_memory(problem)

    limit, size = where.chip.memory_bytes, task.batch_size
    if size is None:
        size = batching.largest(memory, limit, lambda _: True, task.most)
    if size not in programs and size not in failures:
        memory(size)
    found = {"batch_size": size}
    if size in failures:
        return found | {"too_large": failures[size].removeprefix("RESOURCE_EXHAUSTED: ")}
    program, text = programs[size], programs[size].as_text()
    found |= memory_of(program, model, limit)
    if "too_large" in found:
        return found
    sampling = f"{SAMPLING}/while"
    return found | {
        "exchanges": program_text.exchanges(text),
        "exchanged": program_text.exchanged_bytes(text, sampling)._asdict(),
        "kernels": program_text.kernels(text),
        "cycles": program_text.cycles(text, sampling)._asdict(),
    }


def described(where: slices.Slice) -> list:
    """Returns the described chips of one host; raises InputError if its compiler knows none."""
    from jax.experimental import topologies

    sides, gpu = where.host_sides, where.chip.gpu
    if gpu is not None:
        layout = "x".join(map(str, sides))
        more = gpus.description(gpu, where.chip.memory_bytes)
        arguments = (layout, "cuda"), {"topology": layout, "target_config": more}
    else:
        # v5p wants three sides, the others two
        layout = "x".join(map(str, sides[: where.layout.count("x") + 1]))
        arguments = (f"{where.kind}:{layout}", "tpu"), {"chips_per_host_bounds": sides}
    try:
        return topologies.get_topology_desc(*arguments[0], **arguments[1]).devices
    except Exception as problem:  # of many types, depending on what is wrong with the compiler
        first, *_ = str(problem).splitlines() or [type(problem).__name__]
        raise InputError(f"the compiler cannot describe {where.kind}: {first}") from problem


def memory_of(program: "jax.stages.Compiled", model: "TextToImage", limit: int) -> dict:
    """Returns the `bytes` that a model's program takes of a chip, or why it is `too_large`.

    Args:
      limit: the bytes that a chip has.
    """
    needed = _bytes(program, model)
    over = sum(needed.values()) - batching.USED * limit
    if over > 0:
        return {
            "too_large": f"it takes {sum(needed.values()) / GIB:.2f} GiB of a chip, "
            f"{over / GIB:.2f} more than {batching.USED:.0%} of its memory"
        }
    return {"bytes": needed}


def _bytes(program: "jax.stages.Compiled", model: "TextToImage") -> dict[str, int]:
    """Returns the memory of a chip that a model's program takes, by what it is for."""
    said = program.memory_analysis()
    images = said.output_size_in_bytes - said.alias_size_in_bytes
    # Text encoders that are unloaded are there when the program's temporaries and images are not.
    beyond = max(0, model.visiting_bytes - said.temp_size_in_bytes - images)
    return {
        "weights and inputs": said.argument_size_in_bytes,
        "text encoders": model.encoder_bytes + beyond,
        "temporaries": said.temp_size_in_bytes,
        "images": images,
        "code": said.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")  # keeps the libraries' prints out of it
    os.dup2(2, 1)
    try:
        answer = account(Task(**json.load(sys.stdin)))
    except InputError as problem:
        answer = {"refused": str(problem)}
    print(json.dumps(answer), file=own)
