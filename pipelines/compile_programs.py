"""The process that compiles a job's programs into JAX's persistent cache.

    python -m pipelines.compile_programs

Reads a `Task` from standard input, and writes a line of JSON to standard output for each program,
or why there is none. JAX's environment variables say where the programs are kept.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jaxdiff.dataset import plan as plans
from jaxdiff.devices import batching, slices
from jaxdiff.errors import InputError
from jaxdiff.images import loading
from jaxdiff.request import Options
from pipelines import slice_program, worker
from pipelines.generate_options import Models


@dataclass(frozen=True)
class Task:
    """Programs to compile.

    Attributes:
      models: the arguments of `Models`.
      options: the fields of `Options`.
      rows: for each bucket, its values of `plan.BUCKET_COLUMNS`.
      most: for each bucket, the most images on all devices at once.
      target: the slice, as on the command line; None means the devices here.
      batch_size: of each device along `data`; "auto" finds it as a worker does, by running programs
        on the devices here. A CPU uses its own.
    """

    models: dict
    options: dict
    rows: list[dict]
    most: list[int]
    target: str | None
    batch_size: int | str


def compile_all(task: Task, tell: Callable[[dict], None]) -> None:
    """Compiles the programs of all buckets.

    Args:
      tell: called for each program with the `bucket`'s place in the task, `what` the program is
        for, its `batch_size`, the `seconds` that it took, and why it is `too_large` if it is.

    Raises:
      InputError: if the compiler cannot be used, or the model, the options and the mesh do not go
        together.
      UserWarning: if a program cannot be written.
    """
    import jax

    from jaxdiff.devices import compilation
    from jaxdiff.engine.engine import TextToImage
    from jaxdiff.engine.program import SAMPLING

    warnings.filterwarnings("error", "Error writing persistent compilation cache entry")
    where = devices = None
    if task.target is None:
        worker.check_devices()
    else:
        where = slices.parse(task.target)
        devices = slice_program.described(where)
    compilation.keep_programs()
    model = TextToImage(Models(**task.models).open(), Options(**task.options), devices)
    on_cpu = model.mesh.devices.flat[0].platform == "cpu"
    if task.batch_size == batching.AUTO and not on_cpu:
        model.load_weights()  # candidates are run
    compiled = set()
    for bucket, row in enumerate(task.rows):
        request, size = model.resolve(plans.example(task.models, **row)), task.batch_size
        if size == batching.AUTO or on_cpu:
            blank = loading.blank(request, model.prompt_sizes, model.enlarges)
            size = model.largest_batch_size(blank, task.most[bucket])
        began = time.monotonic()
        # The hosts of a slice may have another kind of processor than this one.
        for what, program in model.programs(request, size, on_host=where is None):
            if program in compiled:
                continue
            compiled.add(program)
            found = {"bucket": bucket, "what": what, "batch_size": size}
            try:
                done = program.result()
                if where is not None and what == SAMPLING:
                    found |= slice_program.memory_of(done, model, where.chip.memory_bytes)
            except jax.errors.JaxRuntimeError as problem:
                compilation.without_memory(problem)
                first = str(problem).splitlines()[0]
                found["too_large"] = first.removeprefix("RESOURCE_EXHAUSTED: ")
            tell(found | {"seconds": time.monotonic() - began})
            began = time.monotonic()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")  # keeps the libraries' prints out of it
    os.dup2(2, 1)

    say = partial(print, file=own, flush=True)
    try:
        compile_all(Task(**json.load(sys.stdin)), lambda found: say(json.dumps(found)))
    except InputError as problem:
        say(json.dumps({"refused": str(problem)}))
    except UserWarning as problem:
        say(json.dumps({"failed": str(problem)}))
