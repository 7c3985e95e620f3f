"""Outputs of diffusers' and transformers' networks for the inputs of tests/networks.py."""

import diffusers
import numpy as np
import torch
import transformers


def outputs(network, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the outputs of any network under the names of `networks.outputs`, NHWC."""
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        if isinstance(network, diffusers.AutoencoderKL):
            found = _autoencoder(network, **tensors)
        elif isinstance(network, diffusers.UNet2DConditionModel):
            found = {"output": _nhwc(_unet(network, **tensors))}
        else:
            found = _text_encoder(network, **tensors)
    return {name: value.numpy() for name, value in found.items()}


def _autoencoder(vae, images, latents):
    posterior = vae.encode(_nchw(images)).latent_dist
    return {
        "mean": _nhwc(posterior.mean),
        "log_variance": _nhwc(posterior.logvar),
        "images": _nhwc(vae.decode(_nchw(latents)).sample),
    }


def _unet(unet, latents, timesteps, context, pooled=None, time_ids=None, guidance_scale=None):
    """Passes the conditions as the pipelines do."""
    conditions = {}
    if pooled is not None:
        conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    if guidance_scale is not None:
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        conditions["timestep_cond"] = embed(
            None, guidance_scale - 1, unet.config.time_cond_proj_dim
        )
    return unet(_nchw(latents), timesteps, context, **conditions).sample


def _text_encoder(encoder, token_ids):
    output = encoder(token_ids, output_hidden_states=True)
    final_norm = getattr(encoder, "text_model", encoder).final_layer_norm
    projected = isinstance(encoder, transformers.CLIPTextModelWithProjection)
    return {
        "hidden": output.last_hidden_state,
        "pooled": output.text_embeds if projected else output.pooler_output,
        "earlier": final_norm(output.hidden_states[-2]),  # clip_skip=1
        "unnormed": output.hidden_states[-2],  # what XL uses
    }


def _nhwc(x):
    return x.permute(0, 2, 3, 1)


def _nchw(x):
    return x.permute(0, 3, 1, 2)
