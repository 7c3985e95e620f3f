"""Distills a guided model into a student that needs only a few steps.

The student is a multistep consistency model (Heek et al., 2024, arXiv:2403.06807): the teacher's
trajectory is divided into as many parts as the student has steps, and one step of the student must
lead from the start of a part to its end. The target is computed with several DDIM steps of the
teacher (Salimans and Ho, 2022, arXiv:2202.00512, with all halvings at once), so that it stays fixed
while the student learns. The student takes the guidance scale as an input instead of being
evaluated twice (Meng et al., 2023, arXiv:2210.03142). It is trained at the points that it reaches
itself from noise, so that it learns to correct its own errors. Training needs captions, but no
images.

If the teacher samples with ancestral Euler, so does the student: a part then ends at less noise
than the next one begins with, and fresh noise makes up the difference (Kim et al., 2024,
arXiv:2310.02279, algorithm 3, with a γ for each step), which hides the errors of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.devices import compilation
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion import samplers, sampling
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.diffusion.solvers import SamplerTable
from jaxdiff.diffusion.step_ranges import StepRange
from jaxdiff.engine.program import (
    Denoising,
    Inputs,
    Pass,
    Route,
    Weights,
    denoiser,
    sample_pixels,
)
from jaxdiff.errors import InputError
from jaxdiff.families.config_values import OWN_DEFAULTS
from jaxdiff.training import data
from jaxdiff.training.autoencoder import VALIDATION_SEED
from jaxdiff.training.components import Components, load_model
from jaxdiff.training.loop import Params, Task, captioned
from jaxdiff.training.recipe import ConsistencyRecipe, Data
from jaxdiff.training.shapes import scenes
from jaxdiff.training.text_to_image import DTYPES, conditioning, in_dtype

ANCESTRAL = "EulerAncestralDiscreteScheduler"
RESCALED = "rescale_betas_zero_snr"
GUIDANCE_WIDTH = 256  # of the guidance scale's embedding, as in Luo et al., 2023, arXiv:2310.04378
VALIDATION_BATCHES = 4
# The loss is the norm of an image's error, not its square; otherwise the first step, which has the
# largest errors, would dominate the last. This constant is added to the squares so that the
# gradient exists at zero (pseudo-Huber: Song and Dhariwal, 2023, arXiv:2310.14189, 3.3).
HUBER = 0.00054


@dataclass(frozen=True)
class _Parts:
    """The parts of the task other than the trained weights.

    Attributes:
      recipe: the recipe.
      teacher, student: complete models, which differ only in the U-Net.
      short: the student's sampler table.
      walk: the teacher's steps from each of the student's noise levels, as `_walk` returns them.
    """

    recipe: ConsistencyRecipe
    teacher: Components
    student: Components
    short: SamplerTable
    walk: dict[str, np.ndarray]


def task(recipe: ConsistencyRecipe) -> Task:
    """Makes the training task of a recipe, for `loop.fit`.

    Raises:
      InputError: if the teacher or the captions cannot be read, the teacher is of an unsupported
        kind, or the recipe's numbers do not fit together.
    """
    teacher = load_model(recipe.model)
    for bad, what in (
        (teacher.model.denoiser.guidance_is_input, "is already distilled"),
        (teacher.model.denoiser.inpainting is not None, "is for inpainting"),
        (teacher.model.denoiser.reference is not None, "edits images"),
        (teacher.model.denoiser.enlarging is not None, "enlarges images"),
        (
            teacher.prediction_type == "flow",
            "is trained by flow matching, which DDIM cannot sample",
        ),
    ):
        if bad:
            raise InputError(f"model {recipe.model!r} {what}; use another teacher")
    _refuse_misfits(recipe, teacher)
    scheduler, short, walk = _tables(recipe, teacher.scheduler)
    networks = teacher.family.networks()
    configs = networks.with_guidance_input(teacher.model.configs, GUIDANCE_WIDTH)
    made_for = {
        "steps": recipe.student_steps,
        "guidance_scale": sum(recipe.guidance_scale) / 2,
    }
    student = replace(
        teacher,
        model=networks.build(configs, teacher.pipeline, remat=recipe.computing.remat),
        scheduler=scheduler,
        pipeline={**teacher.pipeline, OWN_DEFAULTS: made_for},
    )
    parts, component = (
        _Parts(recipe, teacher, student, short, walk),
        student.model.denoiser.component,
    )
    if recipe.student:
        begun = _earlier(recipe.student, student)
    else:
        begun = _begun(teacher.params[component], student.model.networks[component].shapes)
    batch, validation = _batches(parts)
    return Task(
        params=begun,
        frozen=teacher.params,
        loss=_loss(parts),
        batch=batch,
        validation=validation,
        preview=_preview(parts),
        export=lambda params, _, directory: student.save(
            directory, {component: params}, np.float16
        ),
    )


def _refuse_misfits(recipe: ConsistencyRecipe, teacher: Components) -> None:
    scales, steps = recipe.guidance_scale, recipe.student_steps
    if len(scales) != 2 or not 1.0 <= scales[0] <= scales[1] <= 100.0:
        raise InputError(
            f"guidance_scale = {list(scales)} must be the lowest and the highest scale, 1 to 100"
        )
    if steps < 1 or recipe.solver_steps < steps or recipe.solver_steps % steps:
        raise InputError(
            f"solver_steps = {recipe.solver_steps} must be a multiple of student_steps = {steps}"
        )
    if recipe.solver_steps > teacher.scheduler.get("num_train_timesteps", 1000):
        raise InputError(
            f"solver_steps = {recipe.solver_steps}: the teacher has fewer timesteps; reduce it"
        )
    if recipe.data.size % teacher.size_multiple:
        raise InputError(
            f"data.size = {recipe.data.size} must be a multiple of {teacher.size_multiple}"
        )


def _tables(
    recipe: ConsistencyRecipe, config: dict
) -> tuple[dict, SamplerTable, dict[str, np.ndarray]]:
    """Returns the student's scheduler config and sampler table, and the teacher's steps.

    Args:
      recipe: the recipe.
      config: the teacher's scheduler config.
    """
    scheduler = _scheduler(config)
    sampler = samplers.of_config(scheduler)
    schedule = noise_schedule(scheduler, sampler)
    short = samplers.sampler_table(sampler, schedule, recipe.student_steps)
    teachers = scheduler | {RESCALED: config.get(RESCALED, False)}
    bars = noise_schedule(teachers, sampler).alpha_bars()
    return scheduler, short, _walk(bars, short, recipe.solver_steps // recipe.student_steps)


def _scheduler(config: dict) -> dict:
    """Returns the student's scheduler config: ancestral Euler if the teacher's is, else DDIM.

    The noisier the start of an ancestral Euler step, the less noise is left before fresh noise is
    added; a start without any signal leaves none. The student would have to make the image in its
    first step, which is more than it can learn. So its pure noise is treated as the highest noise
    level without the rescaling to zero SNR.
    """
    if config.get("_class_name") == ANCESTRAL:
        return config | {"timestep_spacing": "trailing", RESCALED: False}
    known = samplers.SAMPLERS["ddim"].config.keys() - {"thresholding"}  # its default is false
    return {key: value for key, value in config.items() if key in known} | {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
    }


def _walk(bars: np.ndarray, short: SamplerTable, substeps: int) -> dict[str, np.ndarray]:
    """Returns the teacher's DDIM steps along each of the student's steps, without fresh noise.

    Args:
      bars: the signal's share of the variance by the teacher's timestep.
      short: the student's sampler table.
      substeps: the number of teacher steps in each student step.

    Returns:
      "timesteps", "alpha", "sigma" and the "a" and "b" of x' = a x + b x_0, float32 [student's
      steps, substeps]. The last substep also scales x to the signal of the student's next step.
    """
    next_alpha, rest = short.a * short.alpha + short.b[:, 0], short.a * short.sigma

    def timestep_of(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:  # -1: no noise
        levels = alpha**2 / (alpha**2 + sigma**2)
        return np.interp(-levels, -np.append(1.0, bars), np.arange(-1.0, len(bars)))

    begins, ends = timestep_of(short.alpha, short.sigma), timestep_of(next_alpha, rest)
    begins[0] = len(bars) - 1  # the student starts from pure noise, whatever its nominal level
    shares = np.arange(substeps) / substeps
    timesteps = begins[:, None] + (ends - begins)[:, None] * shares
    timesteps = timesteps.round().astype(np.int64)
    alpha, sigma = np.sqrt(bars[timesteps]), np.sqrt(1.0 - bars[timesteps])
    alpha[1:, 0], sigma[1:, 0] = short.alpha[1:], short.sigma[1:]
    a = np.hstack([sigma[:, 1:], rest[:, None]]) / sigma
    b = np.hstack([alpha[:, 1:], next_alpha[:, None]]) - alpha * a
    columns = {"timesteps": timesteps, "alpha": alpha, "sigma": sigma, "a": a, "b": b}
    return {name: column.astype(np.float32) for name, column in columns.items()}


def _begun(teacher: Params, student_shapes: dict) -> Params:
    """Returns the teacher's parameters, with zeros for those that embed the guidance scale."""
    known = dict(jax.tree_util.tree_leaves_with_path(teacher))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.array(known.get(path, np.zeros(leaf.shape, np.float32))),
        student_shapes,
    )


def _earlier(path: str, student: Components) -> Params:
    """Returns an earlier student's parameters; raises InputError if its config is different."""
    earlier, component = load_model(path), student.model.denoiser.component
    if earlier.model.configs.get(component) != student.model.configs[component]:
        raise InputError(f"student {path!r} is not a student of this model; leave it out")
    return earlier.params[component]


def _batches(parts: _Parts) -> tuple[Callable[[int], dict], list[dict]]:
    """Returns a function that makes the batch of each step, and the validation batches.

    A batch has captions, noise and guidance scales.
    """
    recipe, caption = parts.recipe, _captions(parts.recipe.data)
    shape = recipe.batch_size, *_latent_shape(parts.teacher, recipe)

    def batch(step: int, seed: int = recipe.seed) -> dict:
        rng = np.random.default_rng([seed, step])
        captions = [caption(rng) for _ in range(recipe.batch_size)]
        return {
            "token_ids": parts.teacher.tokenized(captions),
            "noise": rng.standard_normal(shape, np.float32),
            "guidance_scale": rng.uniform(*recipe.guidance_scale, len(captions)).astype(np.float32),
        }

    return batch, [batch(number, VALIDATION_SEED) for number in range(VALIDATION_BATCHES)]


def _captions(source: Data) -> Callable[[np.random.Generator], str]:
    """Returns a function that draws a caption from the data."""
    if source.path == scenes.PIXELS:
        scenes.check(source)
        return lambda rng: scenes.draw(source, int(rng.integers(2**32)), 0)[1]
    examples = data.open_examples(source)
    return lambda rng: examples.caption(int(rng.integers(len(examples))))


def _loss(parts: _Parts) -> Callable[[Params, Params, dict, Array], tuple[Array, dict]]:
    rows, steps = parts.short.columns(), parts.recipe.student_steps
    empty_ids = parts.teacher.tokenized([""])

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        noise, scale = batch["noise"], batch["guidance_scale"]
        count, *shape = noise.shape
        params, frozen = in_dtype((params, frozen), DTYPES[parts.recipe.computing.dtype])
        conditions = conditioning(parts.teacher, frozen, batch, shape[:2])
        empty = conditioning(parts.teacher, frozen, {"token_ids": empty_ids}, shape[:2])
        if parts.teacher.model.zeros_for_empty:
            zeros = jax.tree.map(jnp.zeros_like, empty)
            empty = empty._replace(context=zeros.context, pooled=zeros.pooled)
        empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), empty)
        x, wanted = _walked(
            parts,
            _denoiser(parts.student, jax.lax.stop_gradient(params), conditions, None, scale),
            _denoiser(
                parts.teacher,
                frozen[parts.teacher.model.denoiser.component],
                conditions,
                empty,
                scale,
            ),
            noise,
            jax.random.normal(key, (steps, *noise.shape)),
        )
        # The student's steps are evaluated again, all in one batch: gradients through a scan take
        # ten times as long on a CPU. An image's steps are adjacent, so they stay on one device.
        conditions, scale = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, steps, axis=0), (conditions, scale)
        )
        x, wanted = (part.swapaxes(0, 1).reshape(-1, *shape) for part in (x, wanted))
        timesteps, alpha, sigma = (
            jnp.tile(rows[name], count) for name in ("timesteps", "alpha", "sigma")
        )
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        student = _denoiser(parts.student, params, conditions, None, scale)
        x0, _ = student(x, timesteps, alpha, sigma, None)
        # The error of v, in which the squared error of x_0 has the weight 1 / sigma^2.
        errors = (((x0 - wanted) / sigma) ** 2).reshape(count, steps, -1).mean(axis=2)
        lengths = jnp.mean(jnp.sqrt(errors + HUBER**2) - HUBER, axis=0)
        return jnp.mean(lengths), {f"loss_of_step_{i + 1}": loss for i, loss in enumerate(lengths)}

    return loss


def _walked(
    parts: _Parts,
    student: sampling.Denoiser,
    teacher: sampling.Denoiser,
    noise: Array,
    fresh_noise: Array,
) -> tuple[Array, Array]:
    """Returns the student's trajectory from noise, and the x_0 that it should predict there.

    Args:
      parts: the parts of the task.
      student, teacher: the denoisers.
      noise: standard normal, [batch, ...].
      fresh_noise: standard normal, [steps, batch, ...].

    Returns:
      two arrays [steps, batch, ...]: the x at the start of each step, and the x_0 with which the
      step would end where the teacher's does.
    """

    def walk(x: Array, row: dict) -> tuple[Array, None]:
        x0, _ = teacher(x, row["timesteps"], row["alpha"], row["sigma"], None)
        return row["a"] * x + row["b"] * x0, None

    def step(x: Array, rows: tuple[dict, dict, Array]) -> tuple[Array, tuple[Array, Array]]:
        row, teachers, fresh = rows
        a, b = row["a"], row["b"][0]
        end, _ = jax.lax.scan(walk, x, teachers)
        x0, _ = student(x, row["timesteps"], row["alpha"], row["sigma"], None)
        return a * x + b * x0 + row["s"] * fresh, (x, (end - a * x) / b)

    x = noise * parts.short.initial_scale
    return jax.lax.scan(step, x, (parts.short.columns(), parts.walk, fresh_noise))[1]


def _denoiser(
    model: Components, params: Params, conditions, empty, scale: Array
) -> sampling.Denoiser:
    """Makes a model's denoiser; it is guided if `empty`, the conditioning of "", is not None."""
    denoising = Denoising(model.model, model.prediction_type)
    dtype = jax.tree.leaves(params)[0].dtype
    return denoiser(denoising, params, dtype, conditions, empty, scale, guidance_rescale=0.0)


def _latent_shape(model: Components, recipe: ConsistencyRecipe) -> tuple[int, int, int]:
    codec = model.model.codec
    side = recipe.data.size // codec.factor or model.model.denoiser.sample_size
    return side, side, codec.channels


def _preview(parts: _Parts) -> Callable[[Params, Params], np.ndarray]:
    """Returns a function that draws the student's sample grid."""
    student, shape = parts.student, _latent_shape(parts.student, parts.recipe)
    captions = [*parts.recipe.checkpoints.prompts] or scenes.preview_captions()
    table = parts.short
    token_ids, codec = student.tokenized(captions), student.model.codec
    scale = jnp.full(len(captions), sum(parts.recipe.guidance_scale) / 2)

    @compilation.jit
    def sample(params: Params, frozen: Params, noise: Array, fresh_noise: Array | None) -> Array:
        conditions = conditioning(student, frozen, {"token_ids": token_ids}, shape[:2])
        inputs = Inputs(noise, fresh_noise, [conditions], [None], scale)
        pixels, _ = sample_pixels(
            [Denoising(student.model, student.prediction_type)],
            codec,
            jnp.float32,
            Weights([params], frozen[codec.component]),
            [Pass(inputs, table.initial_scale, table.columns())],
            routes=[Route([StepRange(denoiser=0, rows=len(table.timesteps), guided=False)])],
            decoded_at_once=len(captions),
        )
        return pixels

    def preview(params: Params, frozen: Params) -> np.ndarray:
        seeds = np.arange(len(captions), dtype=np.uint32)
        noise = random_noise.draw(seeds, shape, "jax", table.draws)
        return captioned(np.asarray(sample(params, frozen, noise.start, noise.fresh)), captions)

    return preview
