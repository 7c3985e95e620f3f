"""What the comparisons with PyTorch diffusers and transformers share."""

import importlib.util

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # such small networks only wait for their threads
