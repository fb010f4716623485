"""The check of layouts: it passes for what is right and finds what is not."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.check import compare
from moe_jax.check import run as check_run
from moe_jax.check.rows import random_batch
from moe_jax.cli import check as command
from moe_jax.cli import common, config_file
from moe_jax.config import MeshConfig
from moe_jax.moe import balance, sharded
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.parallel import collectives
from moe_jax.parallel.mesh import TOKEN_AXES
from moe_jax.train import setup

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "end_to_end" / "tiny.py"
BLOCK = "segment_0/block_0"
MESHES = {
    "expert=4,data=2": MeshConfig(data=2, expert=4),
    "expert=2,fsdp=2,tensor=2": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(variant=""):
    return config_file.load(f"{TINY}:{variant}" if variant else str(TINY))


def check(dtype, *names, config=None):
    meshes = {name: MESHES[name] for name in names}
    prepared = check_run.prepare(config or tiny(), meshes, False)
    return check_run.check_dtype(prepared, meshes, dtype)


def agrees(results):
    for result in results:
        assert result.passed, result.worst
        names = [d.name for d in result.differences]
        for name in (
            "loss",
            "grad_norm",
            "expert counts",
            "initial parameters",
            f"grad/{BLOCK}/moe/experts/w_down",
            f"router state/{BLOCK}/bias",
            "parameters after/embedding",
            "balance/router_z_loss",
        ):
            assert name in names
        assert any(d.error > 0 for d in result.differences), "nothing was computed"
        assert sum(result.near_ties) == 0


@pytest.mark.slow
def test_passes_in_float32():
    agrees(check("float32", *MESHES))


@pytest.mark.slow
def test_passes_in_float64(float64):
    agrees(check("float64", *MESHES))


def fails(dtype, name):
    (result,) = check(dtype, name)
    assert not result.passed
    assert f"FAIL {name}" in next(command._lines(result))
    return result


def wrong(result):
    return {d.name for d in result.differences if not d.passed}


def shards(axes):
    # On one device the faults are not there: its program is compiled only once.
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes)


def near_the_experts(name):
    # The gradient of the norm before the experts comes through them and the router.
    return name.startswith((f"grad/{BLOCK}/moe/", f"grad/{BLOCK}/feed_forward_norm/"))


@pytest.mark.slow
def test_finds_a_missing_sum_over_tensor(monkeypatch):
    """The output of the experts is that of one part of their width."""

    def first_part(x, axes):
        if shards(axes) == 1:
            return collectives.total(x, axes)
        return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x, 0), axes)

    # Only for the experts: attention and the vocabulary sum over tensor as well.
    faulty = types.SimpleNamespace(**vars(collectives) | {"total": first_part})
    monkeypatch.setattr(sharded, "collectives", faulty)
    result = fails("float32", "expert=2,fsdp=2,tensor=2")
    assert f"grad/{BLOCK}/moe/experts/w_down" in wrong(result)
    assert near_the_experts(result.worst.name)
    assert result.worst.error > 0.5


@pytest.mark.slow
def test_finds_expert_gradients_that_grow_with_the_shards(monkeypatch):
    @jax.custom_vjp
    def scaled(w):
        return w

    scaled.defvjp(lambda w: (w, None), lambda _, g: (g * shards(("expert",)),))
    original = sharded._add_once

    def add_once(weights, *rest):
        if shards(("expert",)) > 1:
            weights = jax.tree.map(scaled, weights)
        return original(weights, *rest)

    monkeypatch.setattr(sharded, "_add_once", add_once)
    result = fails("float32", "expert=4,data=2")
    assert result.worst.name.startswith(f"grad/{BLOCK}/moe/experts/w_")
    assert result.worst.error == pytest.approx(3, rel=1e-3), "four times as large"
    assert "loss" not in wrong(result)
    assert f"grad/{BLOCK}/moe/scorer/w" not in wrong(result)


@pytest.mark.slow
def test_finds_a_bias_from_one_shards_tokens(monkeypatch):
    original = balance.observe

    def first_shard(options, routing):
        part = routing.expert_tk.shape[0] // shards(TOKEN_AXES)
        if shards(TOKEN_AXES) == 1:
            return original(options, routing)
        first = lambda a: a[:part]
        return original(
            options,
            dataclasses.replace(
                routing,
                expert_tk=first(routing.expert_tk),
                valid_tk=first(routing.valid_tk),
                valid_t=first(routing.valid_t),
            ),
        )

    monkeypatch.setattr(balance, "observe", first_shard)
    result = fails("float32", "expert=4,data=2")
    assert result.worst.name == f"router state/{BLOCK}/bias"
    assert wrong(result) == {result.worst.name}


@pytest.mark.slow
def test_finds_draws_that_depend_on_the_shard(monkeypatch):
    original = sharded.DISPATCHES[Exact]

    def noisy(options, rows, routing, experts, axes):
        if shards(axes.tokens) == 1:
            return original(options, rows, routing, experts, axes)
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(axes.tokens))
        noise = jax.random.normal(key, routing.weight_tk.shape)
        weight_tk = routing.weight_tk * (1 + 1e-2 * noise)
        routing = dataclasses.replace(routing, weight_tk=weight_tk)
        return original(options, rows, routing, experts, axes)

    monkeypatch.setitem(sharded.DISPATCHES, Exact, noisy)
    result = fails("float32", "expert=4,data=2")
    assert "loss" in wrong(result)
    assert near_the_experts(result.worst.name)


@pytest.mark.slow
def test_finds_drops_and_reports_ties(capsys):
    """Buckets of a quarter of the mean, and a router that prefers nobody."""
    (result,) = check("float32", "expert=4,data=2", config=tiny("drops"))
    assert not result.passed
    assert min(result.dropped) > 0
    lines = "\n".join(command._lines(result))
    assert (
        f"assignments dropped: {result.dropped[0]} on the mesh, "
        f"{result.dropped[1]} on one device. What is dropped depends on the layout"
    ) in lines
    batch = random_batch(tiny(), "float32")
    valid = int((batch["segments"] > 0).sum())
    assert result.near_ties == [valid, valid], "every token of both layers"
    assert f"near-ties in the top-k: {2 * valid} tokens" in lines


def test_prepared_batch_suits_all_meshes():
    config = tiny()
    config.train.accumulation, config.train.batch_size = 2, 2
    meshes = {"a": MeshConfig(data=3), "b": MeshConfig(data=1, expert=2)}
    prepared = check_run.prepare(config, meshes, False)
    assert prepared.train.batch_size == 12, "2 * lcm(3, 2), at least 8"
    assert config.train.batch_size == 2, "the user's config is left alone"


def test_random_batch_is_packed_text():
    config = tiny()
    batch = random_batch(config, "float32")
    shape = (config.train.batch_size, config.data.sequence_length)
    assert {a.shape for a in batch.values()} == {shape}
    several = False
    for row in range(shape[0]):
        for t in range(shape[1] - 1):
            segments, position = batch["segments"][row], batch["positions"][row]
            if segments[t] == 0:
                assert batch["weights"][row, t] == 0
            elif segments[t + 1] == segments[t]:
                assert position[t + 1] == position[t] + 1
                assert batch["weights"][row, t] == 1
                assert batch["targets"][row, t] == batch["tokens"][row, t + 1]
            elif segments[t + 1]:
                assert position[t + 1] == 0 and batch["weights"][row, t] == 0
                several = True
    assert several and (batch["segments"] == 0).any()


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "moe_jax.cli.check", *arguments],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.slow
def test_command_succeeds(tmp_path):
    figures = tmp_path / "figures.json"
    mesh = "expert=4,data=2"
    result = run_command(f"--config={TINY}", f"--mesh={mesh}", f"--json={figures}")
    assert result.returncode == 0, result.stderr
    assert "passed: 1 mesh in float32 and float64" in result.stdout
    rows = json.loads(figures.read_text())
    assert [(r["mesh"], r["dtype"]) for r in rows] == [
        (mesh, "float32"),
        (mesh, "float64"),
    ]
    for row, tolerance in zip(rows, (1e-5, 1e-8), strict=True):
        assert row["passed"] is True and row["dropped"] == [0, 0]
        assert 0 < row["worst"]["error"] <= tolerance
        assert len(row["differences"]) > 20


def test_command_fails(tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    differences = [
        compare.Difference(name="loss", error=1e-9, allowed=1e-8),
        compare.Difference(name="grad/w", error=0.5, allowed=1e-8),
        compare.Difference(name="grad/v", error=float("nan"), allowed=1e-8),
    ]
    bad = check_run.Result(
        mesh="expert=2",
        dtype="float64",
        differences=differences,
        dropped=(0, 0),
        near_ties=[0, 3],
    )
    good = dataclasses.replace(bad, differences=differences[:1])
    monkeypatch.setattr(check_run, "check", lambda config, meshes: [good, bad])
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    argv = [f"--config={TINY}", "--mesh=expert=2", f"--json={figures}"]
    status = common.execute(command.main, command.define_flags, argv, "check")
    out, err = capsys.readouterr()
    assert (status, err) == (1, "")
    assert "FAILED: 1 of 2" in out
    assert "worst nan in grad/v" in out
    assert "5.00e-01 (allowed 1e-08)  grad/w" in out
    assert out.count("near-ties in the top-k: 3 tokens (per layer [0, 3])") == 2
    rows = json.loads(figures.read_text())
    assert [row["passed"] for row in rows] == [True, False]
    assert rows[1]["worst"] == {"name": "grad/v", "error": None, "allowed": 1e-8}


def test_parts_take_the_first_devices():
    parts = check_run._parts(tiny(), MeshConfig(data=1, expert=2))
    assert isinstance(parts, setup.Parts)
    assert list(parts.mesh.devices.flat) == jax.devices()[:2]
