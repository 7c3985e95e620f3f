"""The options of `jaxdiff generate`, with their help texts. Does not import Beam."""

from jaxdiff import checks
from jaxdiff.dataset import settings
from jaxdiff.dataset.settings import Settings
from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.request import OPTION_CHECKS
from pipelines import target as targets

PATIENCE = 3600.0  # seconds

DESCRIPTION = """\
Generate an image for every prompt in a manifest, and write a finished dataset to a directory. If it
is interrupted, run the same command again to continue.

A manifest is a text file with one prompt per line, or JSON Lines, CSV, TSV, Parquet or a JSON list
(each may be gzipped). It has a column `prompt` and, optionally, id, negative_prompt, seed or seeds,
num_images, width, height, steps, guidance_scale, sampler; to begin with another image: image,
strength, mask_image, outpaint, image_guidance_scale; for ControlNets: control_image,
controlnet_conditioning_scale, control_guidance_start, control_guidance_end, control_mode; for
IP-Adapters: ip_adapter_image, ip_adapter_scale. Other columns are copied to the images' metadata. A
manifest can also be several files, as a glob, a folder of text files with one prompt each, or a
dataset of images.
"""
EPILOG = """\
examples:
  jaxdiff generate --prompt "a red circle above a blue square" --output out/first
  jaxdiff generate --manifest prompts.txt --output out/many --num-images 4

You can also put options in a TOML file (`steps = 30`): jaxdiff generate JOB.toml. Command-line
options override the file. Options not listed here are passed to Apache Beam, such as
--runner FlinkRunner --flink_master host:8081.

exit codes: 0 success, every valid row has its images; 1 failed part-way, run the same command to
continue; 2 the command or its input cannot be used, nothing was written; 3 finished, but the images
in failed.jsonl could not be generated; 75 stopped by a signal, run the same command to continue
"""

MODEL = (
    "a bundled model, a diffusers directory, a .safetensors or .gguf file, a Hub id, or a gs:// or "
    "s3:// URL (default: shapes64)"
)
# For each group: an option's name, its metavar (None: a flag), and its help text.
HELP = {
    "input and output": {
        "manifest": (
            "FILE",
            "the prompts: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, optionally .gz; a "
            "folder of .txt files with one prompt each; or a quoted glob; local, gs:// or s3://; "
            "or - for standard input: JSON Lines, or a table with a column prompt, or one prompt "
            "per line",
        ),
        "prompt": (
            "TEXT",
            "a prompt, in place of --manifest; may be repeated, and works like a text file with "
            "these lines",
        ),
        "prompt_column": ("NAME", "the manifest's column of prompts (default: prompt)"),
        "image_root": (
            "DIR",
            "the folder, or its gs:// or s3:// URL, that the manifest's paths of images are "
            "relative to (default: the manifest's folder)",
        ),
        "output": (
            "DIR",
            "the dataset's directory, or its s3://, gs:// or az:// address: a new one, or one to "
            "continue",
        ),
        "date": (
            "YYYY-MM-DD",
            "the day that replaces {date} in --manifest and --output (default: the environment "
            "variable JAXDIFF_DATE)",
        ),
        "if_missing": (
            "fail|skip",
            "what to do if the manifest does not exist; skip ends with exit code 0 and writes "
            "nothing (default: fail)",
        ),
        "model": ("MODEL", MODEL),
        "base": (
            "MODEL",
            "for a single file without text encoders or other parts: the model to take them from, "
            "a diffusers directory, a Hub id or a URL, such as black-forest-labs/FLUX.1-dev",
        ),
        "variant": (
            "NAME",
            "the weights to use, such as fp16 (default: the full weights)",
        ),
        "refiner": ("MODEL", "a second model for the last steps, such as the SDXL refiner"),
        "lora": (
            "FILE[:WEIGHT]",
            "a LoRA (.safetensors), or the directory of one, to add to the model's weights; may be "
            "repeated",
        ),
        "controlnet": (
            "DIR[:SCALE]",
            "a ControlNet that steers each image by the row's control_image; may be repeated",
        ),
        "ip_adapter": (
            "FILE[:SCALE]",
            "an IP-Adapter (.safetensors, its image_encoder/ beside or above it), which makes the "
            "row's ip_adapter_image a part of the prompt; may be repeated",
        ),
        "upscale": (
            "MODEL[:FACTOR]",
            "a GAN upscaler (.safetensors) that enlarges every image, such as shapes64-x4, and by "
            "how much (default: as much as it can); or latent:1.5,strength=0.4, which enlarges "
            "the latents and denoises them again",
        ),
        "limit": ("N", "generate only the first N images of the manifest"),
        "overwrite": (
            None,
            "start over; the old run is deleted once the first new shard is made",
        ),
        "strict": (
            None,
            "generate nothing if a row of the manifest cannot be used, or asks for something that "
            "has another effect, or none: a prompt that is too long, another tool's syntax, a "
            "negative prompt without guidance, a column that looks like a setting",
        ),
        "retry_failed": (None, "retry the images in failed.jsonl"),
        "dry_run": (
            None,
            "generate nothing; print the plan, and estimates of the time and of the disk space",
        ),
        "measure": (
            None,
            "with --dry-run: load the model and time two batches on this machine",
        ),
    },
    "defaults for rows that do not set them": {
        "num_images": ("N", f"images per prompt (default: {Settings.num_images})"),
        "seed": ("N", "job seed; each image's seed is derived from it (default: 0)"),
        "width": ("PX", "image width (default: the size that the model was trained for)"),
        "height": ("PX", "image height (default: the size that the model was trained for)"),
        "steps": ("N", "denoising steps (default: the model's; 20 for shapes64)"),
        "guidance_scale": (
            "W",
            "how closely to follow the prompt; 1 or less is off (default: the model's; 1.5 for "
            "shapes64)",
        ),
        "sampler": ("NAME", f"{', '.join(SAMPLERS)} (default: the model's)"),
        "negative_prompt": ("TEXT", "what to avoid in the image (default: nothing)"),
        "strength": (
            "SHARE",
            "for rows with an image: how much to change it, 0 to 1 (default: as in the model's "
            "diffusers pipeline, such as 0.8)",
        ),
    },
    "output files": {
        "format": ("NAME", f"{' or '.join(settings.FORMATS)} (default: webdataset)"),
        "image_format": ("NAME", "png, webp (lossless) or jpeg (default: png)"),
        "images_per_shard": (
            "N",
            "images per shard, rounded to full batches (default: 1000; fewer above 512x512)",
        ),
    },
    "sampling, for all images": {
        "scheduler": (
            "KEY=VALUE,...",
            "overrides for scheduler_config.json, such as "
            "use_karras_sigmas=true,timestep_spacing=trailing",
        ),
        "noise": ("NAME", "jax, or torch to draw the same noise as PyTorch (default: jax)"),
        "eta": ("ETA", "ddim only: how much of the noise is drawn anew, 0 to 1 (default: 0)"),
        "guidance_rescale": ("PHI", "reduce overexposure by guidance, 0 to 1 (default: 0, off)"),
        "guidance_start": (
            "SHARE",
            "fraction of the steps before guidance starts (default: 0)",
        ),
        "guidance_stop": ("SHARE", "fraction of the steps after which guidance stops (default: 1)"),
        "clip_skip": ("N", "number of the text encoder's last layers to skip (default: 0)"),
        "prompt_chunks": (
            "N",
            "maximum chunks of 75 tokens per prompt; longer prompts are cut (default: 1)",
        ),
        "refiner_start": (
            "SHARE",
            "fraction of the noise schedule done before the refiner takes over (default: 0.8)",
        ),
        "deep_cache": (
            "N",
            "run the whole U-Net only at every Nth evaluation, and its outermost layers at the "
            "others: faster, slightly worse images (default: 1, off)",
        ),
        "skip_layers": (
            "N,...",
            "layers to leave out in skip-layer guidance, such as 7,8,9 for Stable Diffusion 3.5 "
            "medium; early steps take 1.5 times as long (default: none)",
        ),
        "keep_unmasked": (
            "on|off",
            "for rows with a mask: whether to paste what it leaves out from the original image "
            "(default: on)",
        ),
        "preprocess": (
            "NAME",
            "canny to show ControlNets the edges of their images (default: none, the images "
            "themselves)",
        ),
        "guess_mode": (
            "on|off",
            "let ControlNets guess what to draw from the image alone (default: off)",
        ),
    },
    "performance": {
        "weights": (
            "KIND",
            "int8 or fp8: keep most weights in 8 bits, half of the memory of bfloat16; w8a8: int8, "
            "and multiply 8-bit integers in linear layers; all change the images slightly "
            "(default: full, in --dtype)",
        ),
        "text_encoders": (
            "PLACE",
            "where devices have no room for text encoders: unload keeps them in the host's memory, "
            "and on devices only while they encode the prompts of a shard; host runs them on the "
            "host's CPU (default: device)",
        ),
        "batch_size": (
            "N",
            "images computed at once on each device, or auto: as many as fit, up to 64; a CPU uses "
            f"its own number (default: {Settings.batch_size})",
        ),
        "dtype": ("NAME", "float32 or bfloat16 (default: float32)"),
        "mesh": ("AXES", "device mesh, such as data=4,model=2 (default: all devices for data)"),
        "workers": ("N", "number of processes, each with its share of the GPUs (default: 1)"),
        "patience": (
            "SECONDS",
            "time limit for a batch, including loading and compilation; then its process is "
            f"restarted (default: {PATIENCE:g})",
        ),
        "profile": (
            "DIR",
            "folder for a trace of a few batches, for TensorBoard or Perfetto",
        ),
    },
    "dry run for a TPU slice": targets.HELP,
}
OPTIONS = {name: value for group in HELP.values() for name, (value, _) in group.items()}
NAMES = (  # always text, even if it looks like a number
    *("manifest", "prompt_column", "image_root", "output", "model", "base", "variant", "refiner"),
    *("prompt", "lora", "controlnet", "ip_adapter", "upscale", "profile", "target"),
)
CHOICES = {  # for a shell to complete
    "sampler": (*SAMPLERS,),
    **{
        name: arguments[0]
        for name, (check, *arguments) in (settings.CHECKS | OPTION_CHECKS).items()
        if check is checks.choice
    },
}
REPEATED = ("prompt", "lora", "controlnet", "ip_adapter")
FLAGS = tuple(name for name, value in OPTIONS.items() if value is None)
