"""Programs that several threads start."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.devices import parallel, running


@pytest.fixture
def slow():
    """A program of a second or two."""

    def power(x):
        return jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(y @ x), x)

    x = jnp.eye(1024) / 2
    compiled = jax.jit(power).lower(x).compile()
    return lambda: compiled(x)


def test_a_cpu_finishes_the_programs_of_other_threads_first(slow):
    mesh = parallel.make_mesh("data=1")
    first = running.start(mesh, slow)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(running.start, mesh, first.is_ready).result()


def test_one_thread_at_a_time_starts_a_program():
    mesh = parallel.make_mesh("data=1")
    inside, most = 0, 0
    barrier = threading.Barrier(4)

    def program():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        result = jnp.ones(8).sum().block_until_ready()
        inside -= 1
        return result

    def many(_):
        barrier.wait()
        return [float(running.start(mesh, program)) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(many, range(4))] == [[8.0] * 20] * 4
    assert most == 1


def test_a_result_that_is_lost_is_no_error_of_other_threads():
    mesh = parallel.make_mesh("data=1")
    running.start(mesh, lambda: jnp.ones(8) * 2).delete()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(running.start, mesh, lambda: 7).result() == 7


def test_a_program_that_cannot_be_started_leaves_the_turn_to_others():
    mesh = parallel.make_mesh("data=1")

    def fails():
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        running.start(mesh, fails)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(running.start, mesh, lambda: 7).result() == 7
