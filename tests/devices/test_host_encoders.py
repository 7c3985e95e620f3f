"""Text encoders on the host's CPU take nothing of the mesh, and make the same images."""

import os
import subprocess
import sys

PROGRAM = """
import sys, jax, numpy as np, jaxdiff
requests = [jaxdiff.Request(prompt=prompt, seed=1, steps=2) for prompt in "ab"]
pixels = []
for place, devices in (("device", 2), ("host", 1)):
    model = jaxdiff.load(sys.argv[1], mesh="data=2", text_encoders=place)
    sampler = model._sampler
    (denoiser,) = sampler._denoisers
    for leaf in jax.tree.leaves(denoiser.prompts.params):
        assert len(leaf.sharding.device_set) == devices
    for leaf in jax.tree.leaves(sampler._weights.denoisers):
        assert len(leaf.sharding.device_set) == 2
    assert (sampler.encoder_bytes > 0) == (place == "device")
    pixels.append(np.stack([image.pixels for image in model.generate(requests)]).astype(int))
assert np.abs(pixels[0] - pixels[1]).max() <= 1
assert pixels[0].std() > 10
"""


def test_text_encoders_are_on_the_host_alone(tiny_checkpoint):
    virtual = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": virtual, "NPROC": "4"}
    command = [sys.executable, "-c", PROGRAM, str(tiny_checkpoint)]
    subprocess.run(command, check=True, env=environment)
