"""Settings shared by the comparisons with PyTorch diffusers and transformers."""

import importlib.util

import networks
import pytest

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # more threads slow down networks this small


@pytest.fixture(autouse=True)
def _differences_are_recorded(record_property, monkeypatch):
    """Adds every difference between two networks to the test's properties, for --junitxml."""
    plain = networks.difference

    def difference(ours, reference):
        found = plain(ours, reference)
        record_property("difference", f"{found:.1e}")
        return found

    monkeypatch.setattr(networks, "difference", difference)
