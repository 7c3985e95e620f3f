"""Settings shared by the comparisons with PyTorch diffusers and transformers."""

import importlib.util

import networks
import pytest

from jaxdiff.devices import compilation

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # more threads slow down networks this small


@pytest.fixture(scope="module")
def compiled_fast(compiled_fast):
    """Also compiles fusions in XLA's older way, which takes 0.7 of the time of the newer one."""
    older = {"xla_cpu_use_fusion_emitters": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "CPU_OPTIONS", compilation.CPU_OPTIONS | older)
        compilation._cpu_options.cache_clear()
        yield
    compilation._cpu_options.cache_clear()


@pytest.fixture(autouse=True)
def _differences_are_recorded(record_property, monkeypatch):
    """Adds every difference between two networks to the test's properties, for --junitxml."""
    plain = networks.difference

    def difference(ours, reference):
        found = plain(ours, reference)
        record_property("difference", f"{found:.1e}")
        return found

    monkeypatch.setattr(networks, "difference", difference)
