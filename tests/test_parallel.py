import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdiff import parallel
from jaxdiff.errors import InputError


def test_the_default_mesh_gives_every_device_a_part_of_the_batch():
    mesh = parallel.make_mesh()
    assert mesh.shape == {"data": len(jax.local_devices()), "model": 1}


@pytest.mark.parametrize("spec", ["data", "data=0", "model=x", "rows=2", "data=1;model=1", ""])
def test_unreadable_meshes_are_refused(spec):
    with pytest.raises(InputError, match="write it as"):
        parallel.make_mesh(spec)


def test_parameters_follow_the_first_rule_that_fits():
    mesh = jax.sharding.AbstractMesh((1, 2), parallel.AXES)

    def specs(**shapes):
        leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
        tree = {"attn1": {"to_q": leaves, "to_out": {0: leaves}, "norm": leaves}}
        return jax.tree.map(lambda s: s.spec, parallel.parameter_shardings(mesh, tree))

    found = specs(kernel=(8, 8), bias=(8,))["attn1"]
    assert found["to_q"]["kernel"] == PartitionSpec(None, "model")
    assert found["to_out"][0]["kernel"] == PartitionSpec("model", None)
    assert found["to_q"]["bias"] == found["norm"]["kernel"] == PartitionSpec()
    assert specs(kernel=(8, 7))["attn1"]["to_q"]["kernel"] == PartitionSpec()  # 7 does not halve
