"""Text encoders that are unloaded, or on the host's CPU, and the images that they make."""

import os
import subprocess
import sys

PROGRAM = """
import sys, jax, numpy as np, jaxdiff
requests = [jaxdiff.Request(prompt=prompt, seed=1, steps=2) for prompt in "ab"]
pixels = []
for place, devices in (("device", 2), ("host", 1), ("unload", 0)):
    model = jaxdiff.load(sys.argv[1], mesh="data=2", text_encoders=place)
    sampler = model._sampler
    (denoiser,) = sampler._denoisers
    for leaf in jax.tree.leaves(denoiser.prompts.params):
        assert len(leaf.sharding.device_set) == devices if devices else type(leaf) is np.ndarray
    for leaf in jax.tree.leaves(sampler._weights.denoisers):
        assert len(leaf.sharding.device_set) == 2
    assert (model.encoder_bytes > 0) == (place == "device")
    assert (model.visiting_bytes > denoiser.prompts.device_bytes) == (place == "unload")

    def there(*_):  # the encoder's token embeddings, while images are made
        arrays = [array for array in jax.live_arrays() if array.shape == (641, 32)]
        assert len(arrays) == (place != "unload")

    made = model.generate(requests, progress=there)
    pixels.append(np.stack([image.pixels for image in made]).astype(int))
    del model, sampler, denoiser, leaf
assert np.abs(pixels[0] - pixels[1]).max() <= 1
assert (pixels[0] == pixels[2]).all()
assert pixels[0].std() > 10
"""


def test_text_encoders_leave_the_devices(tiny_checkpoint):
    virtual = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": virtual, "NPROC": "4"}
    command = [sys.executable, "-c", PROGRAM, str(tiny_checkpoint)]
    subprocess.run(command, check=True, env=environment)
