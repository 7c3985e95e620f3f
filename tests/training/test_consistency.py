"""Distillation of a model with random weights: the student's targets, and the exported student."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdiff
from jaxdiff.devices import compilation
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.training import consistency
from jaxdiff.training.recipe import ConsistencyRecipe, Data, Optimizer
from jaxdiff.training.train import train

pytestmark = pytest.mark.usefixtures("compiled_faster")

RECIPE = """
objective = "consistency"
model = "{model}"
steps = 2
batch_size = 2
guidance_scale = [3.0, 3.0]
student_steps = 2
solver_steps = 4

[optimizer]
learning_rate = 1e-2

[checkpoints]
every = 2
"""


def recipe(model, **changes) -> ConsistencyRecipe:
    settings = {"student_steps": 2, "solver_steps": 4, "guidance_scale": (3.0, 3.0), **changes}
    return ConsistencyRecipe(
        objective="consistency",
        model=str(model),
        steps=1,
        batch_size=2,
        optimizer=Optimizer(learning_rate=1e-3),
        **settings,
    )


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("consistency")
    (folder / "recipe.toml").write_text(RECIPE.format(model=tiny_checkpoint))
    train(folder / "recipe.toml", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def unguided(tiny_checkpoint):
    """A function from weights to the loss and its gradients, and the initial weights.

    The teacher also takes one step, and a guidance scale of 1 has no effect.
    """
    changes = {"student_steps": 1, "solver_steps": 1, "guidance_scale": (1.0, 1.0)}
    task = consistency.task(recipe(tiny_checkpoint, **changes))
    loss = compilation.jit(jax.value_and_grad(task.loss, has_aux=True))
    return lambda params: loss(params, task.frozen, task.batch(0), jax.random.key(0)), task.params


def test_a_student_equal_to_its_teacher_has_no_loss(unguided):
    loss, params = unguided
    (error, metrics), _ = loss(params)
    assert float(error) < 1e-4
    assert set(metrics) == {"loss_of_step_1"}


def test_the_loss_is_proportional_to_the_error(unguided):
    loss, params = unguided

    def off_by(much: float) -> float:
        last = {**params["conv_out"], "bias": params["conv_out"]["bias"] + much}
        return float(loss({**params, "conv_out": last})[0][0])

    assert off_by(0.1) > 0.09
    assert off_by(0.2) == pytest.approx(2 * off_by(0.1), rel=0.01)


def test_a_perturbed_student_learns(unguided):
    loss, params = unguided
    params = jax.tree.map(lambda leaf: 1.05 * leaf, params)
    optimizer = optax.adam(1e-4)
    state, errors = optimizer.init(params), []

    @compilation.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        (error, _), gradients = loss(params)
        params, state = step(params, state, gradients)
        errors.append(float(error))
    assert errors[0] > 1e-4
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_the_target_of_a_step_is_the_end_of_the_teachers_walk(sampler, tiny_checkpoint):
    """Replaces the networks by formulas: the teacher predicts x as x_0, the student 0."""
    parts = parts_of(sampler, tiny_checkpoint)
    short, fresh_noise = parts.short, np.array([2.0, 3.0], np.float32).reshape(2, 1, 1, 1, 1)
    x, wanted = consistency._walked(
        parts,
        lambda x, *_: (0 * x, None),
        lambda x, *_: (x, None),
        jnp.ones((1, 1, 1, 1)),
        fresh_noise,
    )
    x, wanted = x.reshape(2), wanted.reshape(2)
    begin = short.initial_scale
    np.testing.assert_allclose(x, [begin, short.a[0] * begin + 2.0 * short.s[0]], rtol=1e-5)
    ends = x * (parts.walk["a"] + parts.walk["b"]).prod(axis=1)
    np.testing.assert_allclose(short.a * x + short.b[:, 0] * wanted, ends, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_a_teacher_with_a_constant_prediction_makes_it_the_target(sampler, tiny_checkpoint):
    """If the teacher always predicts the same image, each step ends at it plus the scaled noise."""
    parts = parts_of(sampler, tiny_checkpoint)
    short, left = parts.short, parts.walk["a"].prod(axis=1)
    x, wanted = consistency._walked(
        parts,
        lambda x, *_: (0 * x, None),
        lambda x, *_: (jnp.full_like(x, 0.7), None),
        jnp.ones((1, 1, 1, 1)),
        jnp.ones((2, 1, 1, 1, 1)),
    )
    x, wanted = x.reshape(2), wanted.reshape(2)
    signal = np.array([short.alpha[1], 1.0])
    ends = 0.7 * signal + left * (x - 0.7 * parts.walk["alpha"][:, 0])
    np.testing.assert_allclose(short.a * x + short.b[:, 0] * wanted, ends, rtol=1e-4)
    np.testing.assert_allclose(wanted[1], 0.7, rtol=1e-4)


def test_a_teacher_samples_with_ddim_on_its_own_schedule(tiny_checkpoint):
    parts = parts_of("ddim", tiny_checkpoint)
    schedule = noise_schedule(parts.teacher.scheduler, "ddim")
    table = samplers.sampler_table("ddim", schedule, 4)
    for name, rows in parts.walk.items():
        wanted = table.b[:, 0] if name == "b" else getattr(table, name)
        np.testing.assert_allclose(rows.reshape(-1), wanted, atol=1e-6)


def test_an_ancestral_teacher_goes_below_the_next_noise_level(tiny_checkpoint):
    """The ratio goes from r to r'^2 / r; fresh noise then raises it to r', the next level."""
    parts = parts_of("euler_ancestral", tiny_checkpoint)
    bars = noise_schedule(parts.teacher.scheduler, "euler_ancestral").alpha_bars()
    walk, (first, second) = parts.walk, parts.short.sigma / parts.short.alpha
    np.testing.assert_allclose(walk["alpha"] ** 2 + walk["sigma"] ** 2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(walk["alpha"][:, 1] ** 2, bars[walk["timesteps"][:, 1].astype(int)])
    noise = np.sqrt(1.0 - bars)[parts.short.timesteps.astype(int)]
    left = noise * walk["a"].prod(axis=1)  # what remains of the noise at the start of a step
    next_alpha = [parts.short.alpha[1], 1.0]
    np.testing.assert_allclose(left / next_alpha, [second**2 / first, 0.0], rtol=1e-3)


def test_an_ancestral_student_does_not_make_the_image_in_its_first_step():
    """If the teacher starts without any signal, the student's start still counts as having some."""
    parts = parts_of("euler_ancestral", "shapes64")
    assert parts.teacher.scheduler["rescale_betas_zero_snr"]
    walk, short = parts.walk, parts.short
    assert walk["timesteps"][0, 0] == 999
    assert walk["alpha"][0, 0] < 1e-3 < short.alpha[0]
    next_alpha, left = short.alpha[1], short.a[0] * short.sigma[0]
    assert left > 0.1 * next_alpha  # the remaining noise before fresh noise is added
    np.testing.assert_allclose(walk["a"][0].prod(), left, rtol=1e-3)


def parts_of(sampler: str, checkpoint) -> consistency._Parts:
    """Makes the parts for a two-step student; its teacher takes two steps for each of these."""
    teacher = consistency.load_model(str(checkpoint))
    classes = {"ddim": "DDIMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}
    settings = recipe(checkpoint)
    scheduler = teacher.scheduler | {"_class_name": classes[sampler]}
    _, short, walk = consistency._tables(settings, scheduler)
    return consistency._Parts(settings, teacher, None, short, walk)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
        {"_class_name": "DDIMScheduler", "clip_sample": True},
        {"_class_name": "DDIMScheduler", "thresholding": True},
        {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    ],
)
def test_a_teacher_may_have_a_scheduler_that_its_student_does_not_support(scheduler):
    """Tests Stable Diffusion 1's scheduler and others; the student keeps only the noise levels."""
    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    made, short, walk = consistency._tables(recipe("shapes64"), levels | scheduler)
    assert made["_class_name"] == "DDIMScheduler"
    assert noise_schedule(made, "ddim").clamp is None
    np.testing.assert_allclose(walk["alpha"][:, 0], short.alpha, rtol=1e-6)
    assert walk["timesteps"][:, 0].tolist() == [999, 499]


def test_a_students_steps_and_guidance_are_its_defaults(run):
    model = jaxdiff.load(run / "model")
    request = model.resolve(jaxdiff.Request(prompt="a red circle"))
    assert (request.steps, request.guidance_scale, request.sampler) == (2, 3.0, "ddim")
    (image,) = model.generate([request])
    assert image.finite


def test_a_batch_depends_only_on_the_step(tiny_checkpoint):
    data = Data(templates=("a {color} {shape}",), held_out=("red circle",))
    task = consistency.task(recipe(tiny_checkpoint, data=data, guidance_scale=(2.0, 4.0)))
    one, again, other = (task.batch(step) for step in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one["noise"] != other["noise"]).any()
    assert ((one["guidance_scale"] >= 2.0) & (one["guidance_scale"] <= 4.0)).all()


@pytest.mark.slow  # tests/parity has generation's zeros
def test_a_teacher_uses_zeros_as_negative_embeddings_if_generation_does(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "zeros")
    index = tmp_path / "zeros" / "model_index.json"
    values = json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": True}
    index.write_text(json.dumps(values))
    losses = {}
    for model in (tiny_checkpoint, tmp_path / "zeros"):
        task = consistency.task(recipe(model, student_steps=1, solver_steps=1))
        loss = compilation.jit(task.loss)
        for scale in (1.0, 3.0):
            batch = task.batch(0) | {"guidance_scale": np.full(2, scale, np.float32)}
            losses[model, scale] = float(
                loss(task.params, task.frozen, batch, jax.random.key(0))[0]
            )
    assert losses[tiny_checkpoint, 1.0] == pytest.approx(losses[tmp_path / "zeros", 1.0], abs=1e-6)
    assert losses[tiny_checkpoint, 3.0] != pytest.approx(losses[tmp_path / "zeros", 3.0], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver_steps": 5}, "solver_steps = 5 must be a multiple of student_steps = 2"),
        ({"solver_steps": 0}, "solver_steps = 0 must be a multiple"),
        ({"solver_steps": 1002}, "solver_steps = 1002: the teacher has fewer timesteps"),
        ({"data": Data(size=60)}, "data.size = 60 must be a multiple of 16"),
        ({"guidance_scale": (3.0,)}, "must be the lowest and the highest"),
        ({"guidance_scale": (6.0, 2.0)}, "must be the lowest and the highest"),
        ({"data": Data(held_out=("mauve circle",))}, "mauve circle"),
    ],
)
def test_invalid_settings_are_rejected(changes, message, tiny_checkpoint):
    with pytest.raises(InputError, match=message) as caught:
        consistency.task(recipe(tiny_checkpoint, **changes))
    assert "\n" not in str(caught.value)


def test_a_student_can_start_from_an_earlier_one(run, tiny_checkpoint):
    begun = consistency.task(recipe(tiny_checkpoint, student=str(run / "model"))).params
    earlier = consistency.load_model(str(run / "model")).params["unet"]
    jax.tree.map(np.testing.assert_array_equal, begun, earlier)
    teacher = consistency.load_model(str(tiny_checkpoint)).params["unet"]
    assert (begun["conv_out"]["kernel"] != teacher["conv_out"]["kernel"]).any()
    with pytest.raises(InputError, match="is not a student of this model; leave it out"):
        consistency.task(recipe(tiny_checkpoint, student=str(tiny_checkpoint)))


def test_a_student_cannot_be_a_teacher(run):
    with pytest.raises(InputError, match="is already distilled; use another teacher"):
        consistency.task(recipe(run / "model"))
