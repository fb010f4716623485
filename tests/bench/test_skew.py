"""Dispatches against the oracle: what is right passes, what is broken does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.bench import skew
from moe_jax.bench.layer import Layer
from moe_jax.config import MeshConfig
from moe_jax.moe.dispatch import DISPATCHES, exact
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather

LAYER = Layer(tokens=128, d_model=8, d_ff=8, num_experts=8, top_k=2)
SMALL = MeshConfig(data=1, expert=2, context=2)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def benches():
    """By layer and mesh, made once."""
    made = {}

    def bench(layer=LAYER, mesh=SMALL):
        key = (layer, str(mesh))
        if key not in made:
            devices = jax.devices()[: mesh.fixed_devices()]
            made[key] = skew.Bench(layer, mesh, devices)
        return made[key]

    return bench


@config.node
class Broken(config.DispatchConfig):
    """Another dispatch, spoilt by a test."""


@pytest.fixture
def broken(benches, monkeypatch):
    """Registers a dispatch made of another; its rows under two patterns."""

    def run(spoil, options=None, patterns=("uniform", "one_expert")):
        options = options or Gather()
        original = DISPATCHES[type(options)]

        def dispatch(_, rows, routing, experts, axes):
            return spoil(original, (options, rows, routing, experts, axes))

        monkeypatch.setitem(DISPATCHES, Broken, dispatch)
        program = benches().compile(Broken())
        return [benches().measure(name, [program], 1)[0] for name in patterns]

    return run


@pytest.fixture(scope="module")
def edited(benches):
    """The rows of two patterns where a program's results were changed on the host."""
    programs = [benches().compile(options) for options in (Gather(), Bucket())]

    def run(edit, program=0, **fields):
        original = programs[program].run
        changed = lambda *given: edit(*jax.device_get(original(*given)))
        made = dataclasses.replace(programs[program], run=changed, **fields)
        patterns = ("uniform", "one_expert")
        return [benches().measure(name, [made], 1)[0] for name in patterns]

    return run


MESHES = {
    "of one": MeshConfig(data=1),
    "fsdp, expert, tensor": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_result_on_every_mesh(benches, mesh):
    """`Gather` is quick to compile, and `Bucket` drops; the rest is not our matter."""
    bench = benches(mesh=MESHES[mesh])
    programs = [bench.compile(options) for options in (Gather(), Bucket())]
    for name in ("zipf", "one_expert", "holes", "empty"):
        gather, buckets = bench.measure(name, programs, 2)
        assert gather.problem == buckets.problem == ""
        assert 0 < gather.error < 1e-5 or name == "empty"
        assert (gather.dropped, buckets.rounds) == (0, 1)
        assert (buckets.dropped > 0) == (name in ("zipf", "one_expert"))
        assert gather.rounds == 1, "a list has room in its last tile"
        assert len(gather.seconds) == 2 and min(gather.seconds) > 0
        assert len(gather.errors) == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions(benches, dtype):
    bench = benches(dataclasses.replace(LAYER, dtype=dtype))
    least, most = {"bfloat16": (1e-3, 5e-2), "float64": (1e-17, 1e-14)}[dtype]
    (row,) = bench.measure("one_expert", [bench.compile(Gather())], 1)
    assert row.problem == "" and least < row.error < most


def test_the_oracle_on_the_mesh_and_what_auto_takes(benches):
    """Every expert on every token takes room; of that the compiler knows."""
    bench = benches(dataclasses.replace(LAYER, num_experts=16, d_ff=64))
    dense, auto = bench.compile(DenseDispatch()), bench.compile(Auto())
    assert auto.name == "Auto: Gather" and dense.name == "DenseDispatch"
    for row in bench.measure("steep_zipf", [dense, auto], 1):
        assert row.problem == ""
    hidden = 16 * (128 // 4) * 64 * 4
    assert dense.temporary_bytes > 2 * hidden
    assert dense.temporary_bytes > 1.5 * auto.temporary_bytes > 0


def test_loads(benches):
    load = benches().load("hot_shard")
    assert (load.expert, load.shard) == (2, 2)
    load = benches().load("one_expert")
    assert (load.expert, load.shard) == (8, 2)
    assert benches().load("empty").expert == 0


def test_quartiles():
    row = skew.Row(
        pattern="p", dispatch="d", seconds=(5.0, 1.0, 2.0, 3.0, 4.0), rounds=1,
        assignments=0, dropped=0, capacity=0, peak_fill=0, errors={}, problem="",
    )  # fmt: skip
    assert (row.median, row.times.quartiles) == (3, (2, 4))
    assert dataclasses.replace(row, seconds=(7.0,)).times.quartiles == (7, 7)


def test_finds_a_lost_token(broken):
    def spoil(dispatch, given):
        y, stats = dispatch(*given)
        return y.at[5].set(0), stats

    for row in broken(spoil):
        assert row.problem.startswith("differs in output, ")
        assert row.error > 0.3


def test_finds_a_round_too_few(broken, monkeypatch):
    """Balanced routings need one; a single expert needs more."""
    original = exact.rounds_needed
    fewer = lambda *given: jnp.maximum(original(*given) - 1, 1)
    monkeypatch.setattr(exact, "rounds_needed", fewer)
    small = Exact(capacity_factor=0.25)
    patterns = ("balanced", "one_expert")
    even, one = broken(lambda f, given: f(*given), small, patterns)
    assert even.problem == "" and one.rounds > 1
    assert "differs in" in one.problem and "gradient of w_up" in one.problem


def test_finds_a_gradient_that_is_lost(broken):
    def spoil(dispatch, given):
        options, rows, *rest = given
        return dispatch(options, jax.lax.stop_gradient(rows), *rest)

    for row in broken(spoil):
        assert row.problem == "differs in gradient of x"


def test_what_is_not_edited_is_right(edited):
    for program in (0, 1):
        for row in edited(lambda *found: found, program):
            assert row.problem == ""


def test_finds_what_is_not_a_number(edited):
    def edit(results, stats):
        spoilt = results["gradient of x"].copy()
        spoilt[0, 0, 0] = np.nan
        return results | {"gradient of x": spoilt}, stats

    for row in edited(edit):
        assert row.problem == "differs in gradient of x" and np.isnan(row.error)


def test_finds_drops_that_nobody_may_have(edited):
    """The buckets' results under the name of a dispatch that promises more."""
    _, one = edited(lambda *found: found, 1, options=Gather())
    assert one.dropped > 0
    assert one.problem == "drops, which only those in MAY_DROP may"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (-1, "differs in output"),
        (1, "but serves more"),
        (1000, "but serves more"),
        (-1000, "but serves more"),
    ],
)
def test_finds_drops_that_are_miscounted(edited, more, problem):
    def edit(results, stats):
        return results, dataclasses.replace(stats, dropped=stats.dropped + more)

    _, one = edited(edit, 1)
    assert problem in one.problem


def test_finds_choices_that_are_miscounted(edited):
    def edit(results, stats):
        return results, dataclasses.replace(stats, assignments=stats.assignments + 1)

    row, _ = edited(edit)
    assert row.problem == "counts 257 choices of 256"
