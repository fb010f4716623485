"""Topologies, programs compiled for them, and programs written by hand."""

import pathlib
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from schedules import ARGUMENTS, PRELUDE, ROOT

from moe_jax.cli import config_file
from moe_jax.config import MeshConfig
from moe_jax.plan import hlo, program, schedule, topology
from moe_jax.plan.chips import Chip
from moe_jax.plan.collectives import Network

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


@pytest.fixture(scope="module", autouse=True)
def no_cache(compile_anew):
    """Plans turn the cache off; what comes behind these tests has it again."""
    with compile_anew():
        yield


@pytest.fixture(scope="session")
def find():
    """`topology.find`, where libtpu is installed."""
    pytest.importorskip("libtpu")
    return topology.find


@pytest.fixture(scope="session")
def host():
    """Eight fake devices of this host."""
    return topology.find("cpu:8")


@pytest.fixture(scope="session")
def compile_text(find):
    """`compile_text(f, (8, 128), ...)`: scheduled HLO for one device of a TPU."""

    def make(function, *shapes, name="v5e:2x2", dtype=jnp.bfloat16):
        one = SingleDeviceSharding(find(name).devices[0])
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=one)
            if isinstance(shape, tuple)
            else jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=one)
            for shape in shapes
        ]
        return jax.jit(function).lower(*arguments).compile().as_text()

    return make


@pytest.fixture(scope="session")
def written():
    """`written(text)`: the module of a program written by hand."""
    return lambda text: hlo.parse(textwrap.dedent(text))


@pytest.fixture(scope="session")
def main_of(written):
    """`main_of(lines)`: module and entry computation with these instructions."""

    def make(lines, before=""):
        body = textwrap.indent(textwrap.dedent(lines).strip(), "  ")
        above = textwrap.dedent(before).strip()
        module = hlo.parse(f"{above}\n\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}")
        return module, module.computations["main"]

    return make


@pytest.fixture(scope="session")
def toy():
    """A chip of round figures: 64 FLOP/s, 100 bytes/s of HBM, 10 of a link."""
    return Chip(
        name="toy",
        kind="toy",
        flops=64.0,
        hbm_bandwidth=100.0,
        hbm_bytes=1e9,
        link_bandwidth=10.0,
        dcn_bandwidth=1.0,
        clock=50.0,
    )


@pytest.fixture
def walk(main_of, toy):
    """Totals of a program of these lines, on two devices along `expert`."""

    def run(lines, before="", **options):
        module, _ = main_of(f"{ARGUMENTS}{lines}\n{ROOT}", PRELUDE + before)
        network = Network({"data": 1, "expert": 2}, (0, 0), toy, (0, 1))
        return schedule.Walk(module, network, **options).run()

    return run


@pytest.fixture(scope="session")
def make_config():
    """`make_config(expert=2)`: the config of `end_to_end/tiny.py` on that mesh."""

    def make(**mesh):
        config = config_file.load(str(TINY))
        config.mesh = MeshConfig(**{"data": 1, **mesh})
        return config

    return make


@pytest.fixture(scope="session")
def compile_step(compile_anew, make_config):
    """`compile_step(topology)`: the tiny step on data=2, fsdp=2, expert=2."""

    def make(where, config=None):
        config = config or make_config(data=2, fsdp=2, expert=2)
        with compile_anew():
            return program.compile_program(config, where)

    return make


@pytest.fixture(scope="session")
def tpu_step(find, compile_step):
    return compile_step(find("v5e:2x4"))


@pytest.fixture(scope="session")
def host_step(host, compile_step):
    jax.config.update("jax_disable_most_optimizations", True)
    yield compile_step(host)
    jax.config.update("jax_disable_most_optimizations", False)
