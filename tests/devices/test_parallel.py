"""Meshes exchange nothing over `data` and split the weights over `model`."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxdiff
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.devices import parallel
from jaxdiff.errors import InputError
from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION_XL
from jaxdiff.models import unet


def test_the_default_mesh_gives_every_device_a_part_of_the_batch():
    mesh = parallel.make_mesh()
    assert mesh.shape == {"data": len(jax.local_devices()), "model": 1}


@pytest.mark.parametrize(
    "spec", ["data", "data=0", "model=x", "rows=2", "data=1;", "data=2,data=4", ""]
)
def test_invalid_meshes_are_rejected(spec):
    with pytest.raises(InputError, match="write it as"):
        parallel.make_mesh(spec)


def test_more_devices_than_available_are_rejected():
    with pytest.raises(InputError, match="data=2,model=8: needs 16 devices, but there are 1"):
        parallel.make_mesh("data=2,model=8")


@pytest.mark.parametrize(("threads", "warned"), [("2", True), ("4", False)])
def test_virtual_devices_without_spare_threads_cause_a_warning(threads, warned):
    flags = "--xla_force_host_platform_device_count=2"
    said = subprocess.run(
        [sys.executable, "-c", "from jaxdiff.devices import parallel; parallel.make_mesh()"],
        env={**os.environ, "XLA_FLAGS": flags, "NPROC": threads},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert ("can make wrong images: set NPROC=4" in said) == warned


def specs(parts, **shapes):
    """Returns the specs of parameters of these shapes in a network, split over `parts` devices."""
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    tree = {
        "attn1": {"to_q": leaves, "to_out": {0: leaves}, "norm": leaves},
        "resnet": {"conv2": leaves},
    }
    mesh = jax.sharding.AbstractMesh((1, parts), parallel.AXES)
    return jax.tree.map(lambda s: s.spec, parallel.parameter_shardings(mesh, tree, unet.SHARDING))


def test_parameters_follow_the_first_rule_that_fits():
    found = specs(2, kernel=(8, 8), bias=(8,))["attn1"]
    assert found["to_q"]["kernel"] == PartitionSpec(None, "model")
    assert found["to_out"][0]["kernel"] == PartitionSpec("model", None)
    assert found["to_q"]["bias"] == found["norm"]["kernel"] == PartitionSpec()
    assert specs(2, kernel=(8, 7))["attn1"]["to_q"]["kernel"] == PartitionSpec()  # 7 is odd
    found = specs(2, kernel=(3, 3, 8, 6))["resnet"]["conv2"]["kernel"]
    assert found == PartitionSpec(None, None, "model", None)


def test_a_model_axis_that_splits_nothing_is_rejected():
    with pytest.raises(InputError, match="--mesh model=3: divides none of this model's widths"):
        specs(3, kernel=(8, 8))


@pytest.mark.parametrize("width", [768, 2048], ids=["SD 1", "SD XL"])
def test_each_device_of_model_holds_its_part_of_all_weights(width):
    family = CONTENTS[width]
    mesh = jax.sharding.AbstractMesh((1, 8), parallel.AXES)
    parsed = {name: it for name, it in family.configs.items() if name != "scheduler"}
    networks = STABLE_DIFFUSION_XL.networks()
    model = networks.build(networks.read_configs(parsed), family.index)
    for component, network in model.networks.items():
        shapes = network.shapes
        places = parallel.parameter_shardings(mesh, shapes, network.sharding)
        held = jax.tree.map(lambda x, place: place.shard_shape(x.shape), shapes, places)
        whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        part = sum(map(math.prod, jax.tree.leaves(held, is_leaf=lambda x: type(x) is tuple)))
        assert part / whole < 1 / 8 + 0.002, component


MESHES = {"data=1": 1, "data=8": 1, "data=2,model=4": 4}  # size of `model`
UNOPTIMIZED = "--xla_backend_optimization_level=0"  # of the machine code, to compile faster
REQUESTS = [  # fewer than devices; enough tokens for attention in blocks
    jaxdiff.Request(prompt=prompt, seed=seed, steps=2, width=256, height=128)
    for seed, prompt in enumerate(["a red circle", "two green rings", "a star"] * 2)
]
ON_EIGHT_DEVICES = """
import json, os, sys
import numpy as np, jaxdiff
checkpoint, directory, meshes, requests, options = sys.argv[1:]
requests = [jaxdiff.Request(**request) for request in json.loads(requests)]
made, programs = {}, {}
for mesh in json.loads(meshes):
    before = set(os.listdir(directory))
    images = jaxdiff.load(checkpoint, mesh=mesh, **json.loads(options)).generate(requests)
    made[mesh] = np.stack([image.pixels for image in images])
    programs[mesh] = sorted(set(os.listdir(directory)) - before)
np.savez(f"{directory}/pixels.npz", **made)
with open(f"{directory}/programs.json", "w") as file:
    json.dump(programs, file)
"""


def made_on_eight_devices(checkpoint, directory, meshes, requests, **options):
    """Returns, by mesh, the pixels that it makes and the text of all compiled programs it ran."""
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # or programs might be neither compiled nor dumped
        "XLA_FLAGS": f"{UNOPTIMIZED} --xla_force_host_platform_device_count=8 "
        f"--xla_dump_hlo_as_text --xla_dump_to={directory}",
    }
    asked = [*map(dataclasses.asdict, requests)]
    arguments = [*map(json.dumps, ([*meshes], asked, options))]
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(checkpoint), str(directory), *arguments]
    subprocess.run(command, check=True, env=environment)
    programs = json.loads((directory / "programs.json").read_text())
    with np.load(directory / "pixels.npz") as pixels:
        return {
            mesh: (
                pixels[mesh],
                [
                    (directory / name).read_text()
                    for name in programs[mesh]
                    if name.endswith("after_optimizations.txt")
                ],
            )
            for mesh in meshes
        }


@pytest.fixture(scope="module")
def on_eight_devices(tiny_checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    return made_on_eight_devices(tiny_checkpoint, directory, MESHES, REQUESTS)


@pytest.mark.parametrize(("mesh", "parts"), MESHES.items())
def test_a_mesh_makes_the_same_images_as_one_device(mesh, parts, on_eight_devices):
    alone = on_eight_devices["data=1"][0].astype(int)
    # Sums that are split over `model` round differently.
    assert np.abs(on_eight_devices[mesh][0] - alone).max() <= (parts > 1)
    assert alone.std() > 10


@pytest.mark.parametrize(("mesh", "parts"), MESHES.items())
def test_nothing_is_exchanged_over_data(mesh, parts, on_eight_devices):
    programs = on_eight_devices[mesh][1]
    assert any("convolution" in program for program in programs)
    groups = [group for program in programs for group in exchanging(program)]
    assert bool(groups) == (parts > 1)
    assert all(len({device // parts for device in group}) == 1 for group in groups)


def exchanging(program):
    """Yields the devices of each group in which a program's collective operations exchange."""
    collective = r" (?:all-|reduce-scatter|collective-|ragged-)[a-z-]*\("
    for line in re.findall(rf"^.*{collective}.*$", program, re.MULTILINE):
        if "-done(" in line:
            continue
        listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[0-9,{}]*\})\}", line)
        tiled = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line)
        if listed:
            yield from ([*map(int, group.split(","))] for group in listed[1][1:-1].split("},{"))
        else:
            shape, grid, order = ([*map(int, t.split(","))] if t else None for t in tiled.groups())
            yield from np.arange(math.prod(grid)).reshape(grid).transpose(order).reshape(shape)


ON_A_HOST = """
import sys
import jax, numpy as np
coordinator, host, checkpoint, file = sys.argv[1:]
jax.distributed.initialize(coordinator, num_processes=2, process_id=int(host))
assert len(jax.devices()) == 2
import jaxdiff
import tests.devices.test_parallel as t
model = jaxdiff.load(checkpoint)
assert [*model.mesh.devices.flat] == jax.local_devices()
np.save(file, model.generate(t.REQUESTS[:1])[0].pixels)
"""


def test_hosts_joined_by_jax_each_use_their_own_devices(
    on_eight_devices, tiny_checkpoint, tmp_path
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / "0.npy", tmp_path / "1.npy"]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", ON_A_HOST, coordinator, str(host), str(tiny_checkpoint), file],
            # XLA has at least as many threads as devices: eight above, so eight here.
            env={**os.environ, "XLA_FLAGS": UNOPTIMIZED, "NPROC": "8"},
        )
        for host, file in enumerate(files)
    ]
    try:
        assert [host.wait(timeout=180) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    alone = on_eight_devices["data=1"][0][0]
    for file in files:
        np.testing.assert_array_equal(np.load(file), alone)
