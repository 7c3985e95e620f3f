"""Walks of samplers with a fixed nonlinear "network": by our tables, by diffusers' schedulers."""

import numpy as np

from jaxdiff.diffusion import noise, samplers
from jaxdiff.diffusion.objective import clamped, to_x0
from jaxdiff.diffusion.scheduler_config import noise_schedule

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02), "squaredcos_cap_v2": (0, 0)}
SHAPE, SEED = (2, 3, 4), 7  # height, width, channels of the latents, and their seed


def config(betas="scaled_linear", **others) -> dict:
    start, end = BETAS[betas]
    common = {"beta_schedule": betas, "beta_start": start, "beta_end": end, "clip_sample": False}
    return {**common, "skip_prk_steps": True, **others}


def network(x, timestep, tanh=np.tanh):
    return timestep / 1000 * x + 0.2 * tanh(x - timestep / 1000)


def ours(sampler, config, steps, eta=0.0, begin=0):
    """Timesteps, and the network's input at each of them, then the result: float64 [rows + 1, ...].

    From row `begin` on, as if the starting noise stood there.
    """
    schedule = noise_schedule(config, sampler)
    table = samplers.sampler_table(sampler, schedule, steps, eta=eta, begin=begin)
    start, fresh, _ = noise.draw(np.array([SEED]), SHAPE, "torch", draws=table.draws)
    x = start[0] * (1.0 if begin else table.initial_scale)
    points, remembered = [x], [np.zeros(SHAPE)] * table.b.shape[1]
    for i in range(begin, len(table.timesteps)):
        output = network(x, table.timesteps[i])
        estimate = to_x0(output, x, table.alpha[i], table.sigma[i], schedule.prediction_type)
        used = clamped(estimate[None], schedule.clamp)[0] if schedule.clamp else estimate
        remembered = [table.p[i] * x + table.q[i] * used, *remembered[:-1]]
        x = table.a[i] * x + np.tensordot(table.b[i], np.array(remembered), 1)
        x = x + table.c[i] * (estimate - used)
        if i - begin < table.draws:
            x = x + table.s[i] * fresh[i - begin, 0]
        points.append(x)
    return table.timesteps[begin:], np.array(points)


def theirs(sampler, config, steps, eta=0.0, begin=0):
    """The same by diffusers, in float32 and with a generator, as its pipelines go."""
    import diffusers
    import torch

    diffusers.logging.set_verbosity_error()  # it warns of keys that are another class's
    name = CLASSES[sampler]
    is_flow = config.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(diffusers, config["_class_name"] if is_flow else name).from_config(config)
    if name == "DPMSolverMultistepScheduler":
        algorithm = "sde-dpmsolver++" if sampler == "dpmpp_2m_sde" else "dpmsolver++"
        scheduler = type(scheduler).from_config(config, algorithm_type=algorithm)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # else two equal timesteps at the top mislead them
        scheduler.set_begin_index(begin)
    generator = torch.Generator("cpu").manual_seed(SEED)
    height, width, channels = SHAPE
    x = torch.randn((1, channels, height, width), generator=generator)
    if begin:  # the noise as the network is to see it
        x = x / scheduler.scale_model_input(torch.ones(()), scheduler.timesteps[begin])
    elif not is_flow:
        x = x * scheduler.init_noise_sigma
    options = {"eta": eta} if sampler == "ddim" else {}
    if sampler in ("ddim", "ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm"):
        options["generator"] = generator
    points = []
    for timestep in scheduler.timesteps[begin:]:
        scaled = x if is_flow else scheduler.scale_model_input(x, timestep)
        points.append(scaled)
        output = network(scaled, timestep, torch.tanh)
        x = scheduler.step(output, timestep, x, **options).prev_sample
    points = torch.cat([*points, x]).permute(0, 2, 3, 1).numpy()
    return scheduler.timesteps[begin:].numpy(), points


def difference(ours, theirs) -> float:
    """The largest distance of two points, relative to their size or the noise's where that is more.

    Raises AssertionError where the network was told other timesteps.
    """
    np.testing.assert_allclose(ours[0], theirs[0], atol=0.5)  # theirs are float32, some of logs
    sizes = np.linalg.norm(theirs[1].reshape(len(theirs[1]), -1), axis=1)
    distances = np.linalg.norm((ours[1] - theirs[1]).reshape(len(theirs[1]), -1), axis=1)
    return float((distances / np.maximum(sizes, np.sqrt(np.prod(SHAPE)))).max())
