"""The mathematics of diffusion as pure functions, written in x_t = alpha_t x_0 + sigma_t eps.

It knows no network: a denoiser is any function of latents and a timestep.
"""
