"""Settings shared by the comparisons with PyTorch diffusers and transformers."""

import importlib.util

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # more threads slow down networks this small
