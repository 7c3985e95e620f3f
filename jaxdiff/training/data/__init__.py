"""Captioned images for training: reads all storage formats and forms batches."""

from jaxdiff.training.data.buckets import assign, batches, buckets, fitted
from jaxdiff.training.data.encoded import EncodedExamples, check_encoders, latents_digest
from jaxdiff.training.data.examples import Examples, open_examples

__all__ = [
    "EncodedExamples",
    "Examples",
    "assign",
    "batches",
    "buckets",
    "check_encoders",
    "fitted",
    "latents_digest",
    "open_examples",
]
