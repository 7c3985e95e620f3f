"""Faults for a test's workers, as code that `faults/sitecustomize.py` runs."""

AT_WORD = """
from jaxdiff.engine.prompts import PromptEncoder
def wrapped(self, prompts, **how):
    if any({word!r} in prompt for prompt in prompts):
        {fault}
    return encode(self, prompts, **how)
encode, PromptEncoder.__call__ = PromptEncoder.__call__, wrapped
"""


def at(word: str, fault: str) -> str:
    """Returns code that triggers a fault when a prompt containing a word is encoded."""
    return AT_WORD.format(word=word, fault=fault)
