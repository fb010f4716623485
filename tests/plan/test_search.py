"""Candidates against the trainer's own rules; the search with a pretended compiler."""

import ast
import copy
import dataclasses
import pathlib
import threading

import jax
import pytest

from moe_jax import config_json
from moe_jax.cli import config_file
from moe_jax.config import MeshConfig, validate
from moe_jax.errors import UserError
from moe_jax.moe.dispatch import DISPATCHES
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.nn.feedforward import Dense
from moe_jax.parallel.mesh import AXES
from moe_jax.plan import candidates, search
from moe_jax.plan.chips import BY_NAME
from moe_jax.plan.topology import Topology
from moe_jax.train import setup

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"
EIGHT = Topology(name="v5e:2x4", slices=1, chip=BY_NAME["v5e"], devices=range(8))


@pytest.fixture
def tiny():
    """4 experts, 4 heads, 2 of keys; 16 rows, on fsdp=2 and whatever remains."""
    config = config_file.load(str(TINY))
    config.train.batch_size = 16
    config.mesh = MeshConfig(fsdp=2)
    return config


@pytest.fixture
def large(tiny):
    """The same kind of model with times and sizes that one can see."""
    model = tiny.model
    model.d_model, model.vocab_size = 2048, 32768
    model.feed_forward.experts.d_ff = 2048
    tiny.data.sequence_length = 2048
    return tiny


def trainer_takes(config):
    try:
        setup.make_parts(validate(config), jax.devices())
    except UserError:
        return False
    return True


def test_every_mesh_that_the_trainer_takes_is_a_candidate_and_no_other(tiny):
    legal = set()
    for mesh in candidates.meshes(8, 1):
        config = copy.deepcopy(tiny)
        config.mesh = MeshConfig(**dict(zip(AXES, mesh, strict=True)))
        if trainer_takes(config):
            legal.add(mesh)
    found = candidates.candidates(tiny, 8)
    assert {c.settings.mesh for c in found} == legal
    # Two key heads: tensor=4 is none of them. 4 experts: nor is expert=8.
    assert (8, 1, 1, 1, 1) in legal and (1, 2, 2, 1, 2) in legal
    assert not any(mesh[4] > 2 or mesh[2] > 4 for mesh in legal)
    assert len(found) == len({c.settings for c in found})


def test_micro_batches_divide_what_a_shard_has(tiny):
    found = candidates.candidates(tiny, 8)
    by_mesh = {}
    for one in found:
        by_mesh.setdefault(one.settings.mesh, set()).add(one.settings.accumulation)
    assert by_mesh[8, 1, 1, 1, 1] == {1, 2}
    assert by_mesh[1, 4, 1, 1, 2] == {1, 2, 4}
    assert {c.config.train.batch_size for c in found} == {16}


def test_meshes_keep_the_context_and_split_the_slices():
    assert candidates.meshes(6, 4) == []
    assert set(candidates.meshes(4, 2)) == {
        (2, 1, 1, 2, 1),
        (1, 2, 1, 2, 1),
        (1, 1, 2, 2, 1),
        (1, 1, 1, 2, 2),
    }
    assert all(mesh[0] % 2 == 0 for mesh in candidates.meshes(16, 1, slices=2))
    assert len(candidates.meshes(16, 1)) == 35


def test_what_may_drop_is_offered_only_where_the_config_drops(tiny):
    kinds = lambda config: {type(d) for d in candidates.dispatches(config)}
    assert kinds(tiny) == set(DISPATCHES) - {Auto, Bucket, Einsum}
    tiny.model.feed_forward.dispatch = Bucket(capacity_factor=3.0)
    assert kinds(tiny) == set(DISPATCHES) - {Auto}
    assert candidates.dispatches(tiny)[0].capacity_factor == 3.0
    tiny.model.feed_forward = Dense(d_ff=32)
    assert candidates.dispatches(tiny) == [None]
    assert {c.settings.dispatch for c in candidates.candidates(tiny, 2)} == {""}


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=2), MeshConfig(data=4, fsdp=2), MeshConfig(data=1)]
)
def test_flags_and_lines_make_the_candidate_of_the_config(tiny, mesh):
    tiny.mesh = mesh
    for one in candidates.candidates(tiny, 8):
        config = copy.deepcopy(tiny)
        config_file.check_overrides(config, list(one.flags))
        for flag in one.flags:
            path, _, text = flag.removeprefix("--config.").partition("=")
            *holders, name = path.split(".")
            owner = config
            for holder in holders:
                owner = getattr(owner, holder)
            value = getattr(owner, name)
            setattr(owner, name, text if isinstance(value, str) else int(text))
        exec("\n".join(one.python), {"config": config})
        sizes = config.mesh.sizes(8)
        assert tuple(sizes[axis] for axis in AXES) == one.settings.mesh
        config.mesh = one.config.mesh
        assert config_json.to_json(config) == config_json.to_json(one.config)


def test_nothing_legal_is_one_message(tiny):
    tiny.train.batch_size = 3
    with pytest.raises(UserError, match="no mesh of 8 devices suits"):
        candidates.candidates(tiny, 8)


def test_neighbours_differ_in_one_setting():
    base = candidates.Settings((1, 4, 2, 1, 1), 1, "full", "Exact")
    near = candidates.Settings((1, 2, 4, 1, 1), 1, "full", "Exact")
    far = candidates.Settings((2, 2, 2, 1, 1), 1, "full", "Exact")
    assert base.is_neighbour(near) and base.is_neighbour(far)
    assert not base.is_neighbour(base)
    assert not base.is_neighbour(candidates.Settings(near.mesh, 2, "full", "Exact"))
    three = candidates.Settings((2, 2, 1, 1, 2), 1, "full", "Exact")
    assert not base.is_neighbour(three)
    assert base.is_neighbour(candidates.Settings(base.mesh, 1, "full", "DenseDispatch"))
    assert str(base) == "fsdp=4 expert=2 accumulation=1 remat=full Exact"


class Compiler:
    """Pretends: seconds from `cost`, no memory where it is infinite."""

    def __init__(self, cost):
        self.cost = cost
        self.seen = []
        self._lock = threading.Lock()

    def __call__(self, request):
        config = config_json.from_json(request.config)
        settings = candidates.settings_of(config, 8)
        with self._lock:
            self.seen.append(settings)
        seconds = self.cost(settings)
        if isinstance(seconds, str):
            return {"error": seconds}
        fits = seconds != float("inf")
        return {
            "fits": fits,
            "peak_bytes": 2**30 if fits else 20 * 2**30,
            "allocated_bytes": 2**30 if fits else 20 * 2**30,
            "step_seconds": seconds if fits else 0.0,
            "exposed_seconds": 0.001,
            "hbm_bytes": 1e9,
            "executed_flops": 1e12,
            "bound": "HBM bandwidth",
        }


def by_micro_batches(settings):
    """Fastest with two micro-batches and all on tensor=2."""
    cost = 0.010 + 0.001 * abs(settings.accumulation - 2) + 0.002 * settings.mesh[4]
    ties = (*settings.mesh, len(settings.remat), len(settings.dispatch))
    return cost + sum(1e-6 * n / 20**i for i, n in enumerate(ties))


def run(config, compiler, **options):
    options = {"cache": "", "compile_best": 6, **options}
    return search.search(config, EIGHT, compile_one=compiler, **options)


def test_the_fastest_compiled_wins_and_the_own_layout_is_among_them(large):
    compiler, told = Compiler(by_micro_batches), []
    found = run(large, compiler, on_plan=told.append)
    own = candidates.settings_of(large, 8)
    assert own in compiler.seen
    assert found.given.candidate.settings == own and found.given.fits
    assert len(compiler.seen) in (6, 7) and len(set(compiler.seen)) == len(
        compiler.seen
    )
    steps = [p.plan["step_seconds"] for p in found.compiled]
    assert steps == sorted(steps)
    assert {p.candidate.settings for p in told} == set(compiler.seen)
    assert all(p.fits for p in told)
    assert steps[0] == min(by_micro_batches(s) for s in compiler.seen)
    assert found.winner is found.points[0]
    rest = [p.estimate.step_seconds for p in found.points[len(steps) :]]
    assert rest == sorted(rest)


def test_the_second_half_goes_to_neighbours_of_the_best(large):
    compiler = Compiler(by_micro_batches)
    run(large, compiler, compile_best=6, workers=1)
    first, second = compiler.seen[:-3], compiler.seen[-3:]
    best = min(first, key=by_micro_batches)
    assert all(settings.is_neighbour(best) for settings in second)
    meshes = [s.mesh for s in first if s != candidates.settings_of(large, 8)]
    assert max(meshes.count(mesh) for mesh in meshes) <= 2


def test_the_first_choice_takes_no_more_than_two_of_a_mesh(large):
    found = run(large, Compiler(by_micro_batches), compile_best=1)
    mesh = found.given.candidate.settings.mesh
    of_mesh = [p for p in found.points if p.candidate.settings.mesh == mesh]
    other = next(p for p in found.points if p not in of_mesh)
    chosen = search.first_choice([*of_mesh, other], 4)
    assert len(of_mesh) > 3 and len(chosen) == 3 and other in chosen
    fastest = sorted(of_mesh, key=lambda p: p.estimate.step_seconds)[:2]
    assert [p for p in chosen if p is not other] == fastest
    assert search.first_choice(of_mesh, 1) == fastest[:1]


def test_what_does_not_fit_or_fails_never_wins(large):
    def cost(settings):
        if settings.remat == "exchanges":
            return "the compiler crashed"
        return 0.02 if settings.remat == "full" else float("inf")

    found = run(large, Compiler(cost), compile_best=24)
    best, capacity = found.winner, found.capacity
    assert {p.candidate.settings.remat for p in found.compiled if p.fits} == {"full"}
    assert best.candidate.settings.remat == "full"
    reasons = [search.reason(p, best, capacity) for p in found.compiled if not p.fits]
    assert any("does not fit, 4.56 GB too much" in why for why in reasons)
    assert "was not compiled: the compiler crashed" in reasons
    text = "\n".join(search.lines(found))
    assert "no fit" in text and "failed" in text


def test_where_nothing_fits_the_smallest_are_tried_and_named(large):
    compiler = Compiler(lambda settings: float("inf"))
    found = run(large, compiler, workers=1)
    assert found.winner is None and found.neighbours == ()
    peaks = {p.candidate.settings: p.estimate.peak_bytes for p in found.points}
    left = [p for s, p in peaks.items() if s not in compiler.seen[:-3]]
    assert [peaks[s] for s in compiler.seen[-3:]] == sorted(left)[:3]
    assert "None of them fits" in list(search.lines(found))[-1]


def test_what_cannot_fit_is_not_compiled(large):
    large.model.d_model = large.model.feed_forward.experts.d_ff = 8192
    compiler = Compiler(by_micro_batches)
    found = run(large, compiler)
    limit = search.FIT_MARGIN * EIGHT.chip.hbm_bytes
    big = [p for p in found.points if p.estimate.peak_bytes > limit]
    assert 0 < len(big) < len(found.points)
    assert not set(compiler.seen) & {
        p.candidate.settings for p in big if p is not found.given
    }
    why = [search.reason(p, found.winner, found.capacity) for p in big if not p.plan]
    assert why and all("would not fit" in text for text in why)


def test_the_lines_say_what_to_paste_and_why(large):
    large.model.feed_forward.dispatch = DenseDispatch()
    found = run(large, Compiler(lambda s: 0.01 + (s.dispatch == "DenseDispatch")))
    text = list(search.lines(found))
    best = found.winner.candidate
    chosen = best.settings.dispatch
    assert chosen != "DenseDispatch"
    assert "  " + " ".join(best.flags) in text
    paste = f"  config.model.feed_forward.dispatch = {chosen}(capacity_factor=0.0)"
    assert paste in text
    assert sum("<- this config" in line for line in text) == 1
    start = text.index("Its neighbours, one setting away:")
    near = text[start + 1 :]
    assert near and len(near) <= 12
    assert all(" ms " in line or "fit" in line for line in near)
    own = next(line for line in text[:start] if "<- this config" in line)
    assert own.split()[0] == "1010.00" and "bound by HBM bandwidth" in own
    slow = copy.copy(found.points[0])
    assert "+0.00 ms compiled" in search.reason(slow, found.winner, 2**34)


def test_reasons_name_the_parts_that_grew(large):
    large.model.remat = "dots"
    large.mesh = MeshConfig(fsdp=2, expert=2)
    found = run(large, Compiler(lambda s: 0.01), compile_best=2)
    why = lambda p: search.reason(p, found.given, found.capacity)
    own = found.given.candidate.settings
    at = lambda **new: next(
        why(p)
        for p in found.points
        if p.candidate.settings == dataclasses.replace(own, **new)
    )
    assert "recomputation +" in at(remat="full")
    assert "weight gathers +" in at(accumulation=2)
    assert "experts +" in at(dispatch="DenseDispatch")
    assert "tensor sums +" in at(mesh=(1, 2, 2, 1, 2))
    assert "token exchange +" in at(mesh=(1, 1, 4, 1, 2))


@pytest.mark.parametrize(
    ("remat", "offload", "word"),
    [
        ("full,none", False, "remat=full,none is not ranked"),
        ("host:input", False, "remat=host:input is not ranked"),
        ("full", True, "offload_optimizer is not ranked"),
    ],
)
def test_what_the_formulas_do_not_know_is_refused(tiny, remat, offload, word):
    tiny.model.remat, tiny.train.offload_optimizer = remat, offload
    with pytest.raises(UserError, match=word):
        search._check(tiny)


def test_fake_devices_have_no_times(tiny):
    host = Topology(name="cpu:8", slices=1, chip=None, devices=range(8))
    with pytest.raises(UserError, match="fake devices have none"):
        search.search(tiny, host, cache="", compile_one=Compiler(by_micro_batches))


def test_plans_are_kept_and_failures_are_not(tiny, tmp_path):
    cost = lambda s: "no luck" if s.accumulation == 1 else 0.01
    first, second = Compiler(cost), Compiler(cost)
    cache = str(tmp_path / "plans")
    a = run(tiny, first, cache=cache)
    b = run(tiny, second, cache=cache)
    assert [p.plan for p in a.compiled] == [p.plan for p in b.compiled]
    assert set(second.seen) == {s for s in first.seen if s.accumulation == 1}
    assert len(list((tmp_path / "plans").iterdir())) == len(first.seen) - len(
        second.seen
    )


def test_python_lines_are_python(tiny):
    tiny.model.feed_forward.dispatch = Exact(capacity_factor=2.0)
    lines = {c.python for c in candidates.candidates(tiny, 2)}
    assert () in lines and len(lines) == len(DISPATCHES) - 3
    for text in lines:
        ast.parse("\n".join(text))
