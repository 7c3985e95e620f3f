"""The mathematics of diffusion as pure functions, in terms of x_t = alpha_t x_0 + sigma_t eps.

It does not depend on the networks: a denoiser is any function of latents and a timestep.
"""
