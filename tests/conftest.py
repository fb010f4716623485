"""Eight fake CPU devices, one compilation cache for the session, meshes, float64."""

# ruff: noqa: I001
import moe_jax  # noqa: F401  Before jax: it sizes the thread pool of the CPU client.
import contextlib
import math

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from moe_jax.config import MeshConfig
from moe_jax.parallel import mesh as mesh_lib

if jax.config.jax_num_cpu_devices != 8:
    with contextlib.suppress(RuntimeError):  # Something has counted devices already.
        jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs that several tests compile are compiled once a session."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


@pytest.fixture(scope="session")
def compile_anew(compilation_cache):
    """A context without the cache: what the compiler writes down is there."""

    @contextlib.contextmanager
    def make():
        before = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        jax_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", before)
            jax_cache.reset_cache()

    return make


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose programs run for milliseconds and are judged by values."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def float64():
    """The test runs in double precision; all others stay in single."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def axes_mesh():
    """`axes_mesh(data=2, expert=4)`: a mesh of the trainer's five axes."""

    def make(**sizes):
        sizes = {"data": 1, **sizes}
        devices = jax.devices()[: math.prod(sizes.values())]
        return mesh_lib.make_mesh(MeshConfig(**sizes), devices)

    return make


@pytest.fixture(scope="session")
def absent_gpus():
    """`absent_gpus(expert=4)`: programs are traced for a mesh of GPUs, not run."""

    def make(**sizes):
        shape = tuple(sizes.get(axis, 1) for axis in mesh_lib.AXES)
        return jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh(
                shape,
                mesh_lib.AXES,
                axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
                abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu"),
            )
        )

    return make
