"""What both halves of the page of Stable Diffusion's upscalers know. Imports no JAX."""

NOISE_LEVEL = 20  # the timestep of the noise in what the x4 upscaler sees
LATENT_FACTOR = 2  # by how much the latent upscaler enlarges
