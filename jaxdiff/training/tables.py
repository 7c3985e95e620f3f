"""The tables of a recipe, such as `[optimizer]`, with their defaults."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Optimizer:
    """How gradients are turned into updates.

    Attributes:
      name: "adamw" (Loshchilov and Hutter, 2019), "adafactor", "lion", "muon" or "sgd", from optax.
      learning_rate: the peak learning rate.
      schedule: "cosine" decay to zero after the warm-up, or "constant".
      warmup_steps: steps of linear growth from zero.
      cooldown_steps: steps of linear decay to zero at the end of a constant schedule (Hägele et
        al., 2024, arXiv:2405.18392).
      weight_decay: decoupled from the gradient; applies only to kernels and embeddings.
      beta1, beta2: decay rates of the moments, for optimizers that have them.
      clip_norm: the maximum norm of the gradient; 0 disables clipping.
      accumulate: the number of batches whose gradients are averaged for one update.
    """

    learning_rate: float
    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 200
    cooldown_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0
    accumulate: int = 1


@dataclass(frozen=True)
class Average:
    """The exponential moving average of the weights; these are the weights that are exported.

    Attributes:
      decay: the decay per step. It starts lower, at (1 + step) / (10 + step), to forget the random
        initial weights.
      relative_width: if not 0, the average covers a fixed fraction of the training so far: the
        standard deviation of the power function of Karras et al., 2024, arXiv:2312.02696, 3.1.
    """

    decay: float = 0.999
    relative_width: float = 0.0


@dataclass(frozen=True)
class Computing:
    """Precision, rematerialization and sharding.

    Attributes:
      dtype: the dtype of activations and of the weights in computations; the stored weights are
        float32.
      remat: recompute activations in the backward pass instead of storing them (gradient
        checkpointing; Chen et al., 2016, arXiv:1604.06174).
      shard: also split weights and optimizer state across the devices (Rajbhandari et al., 2020,
        arXiv:1910.02054, stage 3, known as FSDP).
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    shard: bool = False


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are written, and which are kept.

    Attributes:
      every: steps between checkpoints, each with a sample grid and a validation.
      keep: how many of the newest checkpoints to keep.
      keep_best: how many checkpoints with the lowest validation loss to keep as well.
      prompts: what the sample grids show, for models of text alone; by default captions of the
        data.
    """

    every: int = 500
    keep: int = 2
    keep_best: int = 1
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """Captioned images.

    Attributes:
      path: "shapes" for the shapes world; a folder of images with metadata.jsonl, of WebDataset
        shards or of Parquet files; a dataset from `jaxdiff generate`; the output of
        `pipelines.encode`.
      captions: the column (or the file extension) of the captions; "" detects it.
      control: method "controlnet" only: the column (or the file extension) of the control images,
        each as large as its image. The shapes world draws outlines.
      size: in pixels, the side of the square whose area images are resized to; 0 for the model's.
      aspect_ratios: the largest aspect ratio of the buckets, and inverted the smallest; 1 crops to
        squares.
      flip: mirror half of the images; only for captions that never mention left or right.
      scenes: shapes world only: how many scenes are drawn and encoded before training starts.
      composed: shapes world only: objects are large and evenly spread instead of randomly placed.
      templates: shapes world only: the caption templates. A template listed twice is drawn twice as
        often; an empty list means all templates.
      held_out: shapes world only: "color shape" pairs excluded from every scene and caption.
    """

    path: str = "shapes"
    captions: str = ""
    control: str = "conditioning_image"
    size: int = 0
    aspect_ratios: float = 1.0
    flip: bool = False
    scenes: int = 65536
    composed: bool = False
    templates: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loss:
    """The weights and noise settings of the denoising loss.

    Attributes:
      timesteps: their distribution: "uniform", or "logit_normal" (Esser et al., 2024,
        arXiv:2403.03206, equation 19) with the two values below. For flow matching, the scheduler's
        `shift` is applied after that (equation 23), unless it is dynamic.
      logit_mean, logit_std: mean and standard deviation of the logit of the timestep, scaled to
        [0, 1]; a mean above 0 gives more noise, a mean of ln(s) is a shift of s.
      min_snr_gamma: limits the weight of low noise levels (Hang et al., 2023, arXiv:2303.09556);
        0 disables this.
      offset_noise: standard deviation of noise that is constant across a channel (Guttenberg,
        2023); 0 disables it.
      places: weight of the auxiliary loss for locating each shape of the shapes world
        (`training/shapes/places.py`); 0 disables it.
    """

    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float = 0.0
    offset_noise: float = 0.0
    places: float = 0.0


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the attention matrices (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
      rank: the rank of the updates.
      alpha: the updates are scaled by alpha / rank; 0 sets alpha to the rank.
      text_encoder: whether to train the attention of the text encoders too.
    """

    rank: int = 8
    alpha: float = 0.0
    text_encoder: bool = False


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (Ruiz et al., 2023, arXiv:2208.12242, 3.3).

    Attributes:
      prompt: the prompt for the class images, which the model generates before training starts.
      images: how many class images to generate.
      weight: the weight of their loss; the loss of the subject's images has weight 1.
    """

    prompt: str
    images: int = 100
    weight: float = 1.0


@dataclass(frozen=True)
class Degradation:
    """How the small images are damaged that an upscaler is trained on; see `data/degradation.py`.

    Attributes:
      rounds: how often; 0 gives clean small images.
      blur: the largest standard deviation of a blur, in pixels of the small image.
      resize: the smallest factor of a resize on the way.
      noise: the largest standard deviation of noise, of 255.
      jpeg: the lowest quality of a JPEG.
    """

    rounds: int = 2
    blur: float = 0.8
    resize: float = 0.5
    noise: float = 10.0
    jpeg: int = 50
