"""Faults for a test's workers, as code that `faults/sitecustomize.py` runs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

PATHS = (str(Path(__file__).parent / "faults"), str(Path(__file__).parents[2]))
AT_WORD = """
from jaxdiff.engine.prompts import PromptEncoder
def wrapped(self, prompts, **how):
    if any({word!r} in prompt for prompt in prompts):
        {fault}
    return encode(self, prompts, **how)
encode, PromptEncoder.__call__ = PromptEncoder.__call__, wrapped
"""
AT_WORD_OF_NOISE = """
from noise import NoiseModel
def wrapped(self, batch):
    if any({word!r} in r.prompt + r.negative_prompt for r in batch):
        {fault}
    return make(self, batch)
make, NoiseModel.make = NoiseModel.make, wrapped
"""


def at(word: str, fault: str) -> str:
    """Returns code that triggers a fault when a prompt containing a word is encoded."""
    return AT_WORD.format(word=word, fault=fault)


def in_noise_at(word: str, fault: str) -> str:
    """Returns code that triggers a fault when `NoiseModel` is to draw a prompt with a word."""
    return AT_WORD_OF_NOISE.format(word=word, fault=fault)


def injector(patch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Returns a function that makes workers started from then on run some code first, or none."""
    patch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    patch.setenv("FAULT", "")
    return lambda code: patch.setenv("FAULT", code or "")
