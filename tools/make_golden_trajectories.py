"""Writes tests/golden/trajectories.npz, diffusers' sampling paths, for tests without torch.

    python tools/make_golden_trajectories.py

Each case is a sampler, a scheduler config and a number of steps; all use the fixed network of
tests/trajectories.py. Run it again only after a change in diffusers or for a new case.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import trajectories  # noqa: E402

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
STABLE_DIFFUSION = {"steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False}
V_PREDICTION = {"prediction_type": "v_prediction"}
COMMON = (
    (STABLE_DIFFUSION, 20),
    ({**V_PREDICTION, **ZERO_SNR}, 7),
    ({"beta_schedule": "linear", "timestep_spacing": "linspace"}, 4),
)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
OWN = {
    "ddim": ((STABLE_DIFFUSION, 10, 0.7),),
    "ddpm": (({"variance_type": "fixed_large"}, 10),),
    "pndm": ((V_PREDICTION, 3),),
    "euler": ((FLOW, 10), ({"use_karras_sigmas": True}, 10), ({"timestep_spacing": "trailing"}, 1)),
    "euler_ancestral": (({"timestep_spacing": "trailing"}, 1),),
    "heun": (({"use_karras_sigmas": True}, 10),),
    "dpmpp_2m": (
        ({"use_karras_sigmas": True}, 20),
        ({"use_exponential_sigmas": True, "euler_at_final": True}, 10),
        ({"final_sigmas_type": "sigma_min"}, 20),
    ),
    "dpmpp_2m_sde": (({"use_karras_sigmas": True}, 20),),
    "unipc": (
        ({"use_karras_sigmas": True}, 10),
        ({"solver_order": 3}, 10),
        ({"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 10),
    ),
    "lcm": (({"original_inference_steps": 100}, 8),),
}


def main() -> None:
    """Runs every case and writes the file."""
    import diffusers
    import torch

    cases, arrays = [], {}
    for sampler in trajectories.CLASSES:
        for others, steps, *eta in (*COMMON, *OWN[sampler]):
            config = trajectories.config(**others) if others is not FLOW else FLOW
            timesteps, points = trajectories.theirs(sampler, config, steps, *eta)
            name = f"{len(cases):02d}"
            arrays[f"{name}.timesteps"] = timesteps.astype(np.float32)
            arrays[f"{name}.points"] = points.astype(np.float32)
            eta = eta[0] if eta else 0.0
            cases.append({"sampler": sampler, "config": config, "steps": steps, "eta": eta})
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]}
    about = json.dumps({"versions": versions, "cases": cases})
    path = ROOT / "tests" / "golden" / "trajectories.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, about=about, **arrays)
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
