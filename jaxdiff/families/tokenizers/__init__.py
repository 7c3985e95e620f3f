"""The text encoders' tokenizers, which are those of transformers."""

import logging

NO_PYTORCH = "PyTorch was not found."  # transformers' warning; its tokenizers need none

logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith(NO_PYTORCH)
)
