"""Saving, keeping and restoring when nothing is broken."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from moe_jax.checkpoint import Checkpoints, manifest, trees
from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError


class Moments(NamedTuple):
    mu: Any
    empty: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: Any
    opt: Any
    step: Any


def values(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.normal(size=(16, 12)).astype(np.float32),
        "layers": [{"b": rng.normal(size=(8, 3)).astype(jnp.bfloat16)}, {}],
        "none": None,
        "no_rows": np.zeros((0, 4), np.float32),
        "mask": rng.integers(0, 2, 8).astype(bool),
        "tokens": rng.integers(0, 256, (8, 2)).astype(np.uint8),
    }
    return State(params, (Moments(params, ()), None), np.int32(seed))


@pytest.fixture
def open_folder(tmp_path):
    opened = []

    def make(read_only=False, **config):
        folder = str(tmp_path / "checkpoints")
        config = CheckpointConfig(**({"every": 1} | config))
        opened.append(Checkpoints(folder, config, read_only=read_only))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


@pytest.mark.parametrize("shape", [(8,), (2, 4), (4, 2), (1,)])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_restores_the_same_bits_onto_other_meshes(
    shape, axis_type, open_folder, mesh_of, placed, abstract, same_bits
):
    state = placed(values(), mesh_of((2, 4)))
    saver = open_folder()
    assert saver.save(1, state, {"position": [3, (4,)], "hash": "ab"})
    saver.wait()
    target = abstract(placed(values(1), mesh_of(shape, axis_type)))
    restored = open_folder(read_only=True).restore(target)
    assert same_bits(restored.state, state)
    assert isinstance(restored.state.opt[0], Moments)
    for leaf, wanted in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True
    ):
        assert leaf.sharding == wanted.sharding
    assert restored.step == 1 and restored.notes == []
    assert restored.data == {"position": [3, [4]], "hash": "ab"}


def test_buffers_may_be_donated_during_the_save(
    open_folder, mesh_of, placed, abstract, same_bits
):
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 3 + 1, s),
        donate_argnums=0,
    )
    mesh = mesh_of((2, 4))
    tree = {"w": np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)}
    state = placed(tree, mesh)
    step(state)
    assert state["w"].is_deleted()  # Donation is for real here.

    saver = open_folder(keep_last=9)
    state, history = placed(tree, mesh), []
    for i in range(5):
        history.append(jax.tree.map(lambda x: np.array(x, copy=True), state))
        target = abstract(state)
        saver.save(i, state, {})
        for _ in range(3):
            state = step(state)
    for i, want in enumerate(history):
        assert same_bits(saver.restore(target, step=i).state, want)


def test_when_it_saves(open_folder, placed, mesh_of, abstract):
    saver = open_folder(every=10)
    state = placed(values(), mesh_of((8,)))
    saved = [saver.save(step, state, {}) for step in (5, 10, 15, 20)]
    assert saved == [False, True, False, True]
    assert saver.save(25, state, {"first": True}, force=True)
    assert not saver.save(25, state, {"first": False}, force=True)
    saver.wait()
    assert saver.steps() == [20, 25]
    assert saver.restore(abstract(state)).data == {"first": True}


def test_what_it_keeps(open_folder, placed, mesh_of, tmp_path):
    saver = open_folder(keep_last=2, keep_every=4)
    state = placed({"w": np.ones(8)}, mesh_of((8,)))
    for step in range(1, 12):
        saver.save(step, state, {})
    saver.wait()
    assert saver.steps() == [4, 8, 10, 11]
    on_disk = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert on_disk == ["10", "11", "4", "8"]


def test_the_format_knows_no_classes(open_folder, placed, mesh_of):
    """Another class with the same names reads it; a golden list of names."""
    state = placed(values(), mesh_of((8,)))
    assert sorted(trees.named_leaves(state)) == sorted(
        [
            f"{at}/{n}"
            for at in ("params", "opt/0/mu")
            for n in ("layers/0/b", "mask", "no_rows", "tokens", "w")
        ]
        + ["step"]
    )
    saver = open_folder()
    saver.save(1, state, {})
    target = trees.nested(
        {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in trees.named_leaves(state).items()
        }
    )
    restored = saver.restore(target).state
    assert np.array_equal(restored["opt"]["0"]["mu"]["w"], state.params["w"])


def test_restores_a_part(open_folder, placed, mesh_of, abstract, same_bits):
    saver = open_folder()
    state = placed(values(), mesh_of((2, 4)))
    assert saver.restore_subtree(abstract(state.params), "params") is None
    saver.save(3, state, {"position": 5})
    target = abstract(placed(values(1), mesh_of((8,))))
    found = saver.restore_subtree(target.params, "params")
    assert same_bits(found.state, state.params) and found.data == {"position": 5}
    found = saver.restore_subtree(target.params["w"], "params/w", step=3)
    assert same_bits(found.state, state.params["w"])
    with pytest.raises(UserError, match=r"missing in the checkpoint: ema/w float32"):
        saver.restore_subtree({"w": target.params["w"]}, "ema")


def test_differences_are_readable(open_folder, placed, mesh_of, abstract, capfd):
    saver = open_folder()
    mesh = mesh_of((2, 4))
    saver.save(7, placed(values(), mesh), {})
    other = placed(values(), mesh)
    other.params["w"] = other.params["w"][:, :6]
    other.params["tokens"] = other.params["tokens"].astype(jnp.int32)
    other.params["new"] = other.params.pop("mask")
    with pytest.raises(UserError) as caught:
        saver.restore(abstract(other))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("step 7 of ") and "does not fit" in lines[0]
    assert "  missing in the checkpoint: params/new bool[8]" in lines
    assert "  only in the checkpoint: params/mask bool[8]" in lines
    assert "  params/w: float32[16, 12] -> float32[16, 6]" in lines
    assert "  params/tokens: uint8[8, 2] -> int32[8, 2]" in lines
    many = {f"w{i}": other.params["w"] for i in range(40)}
    with pytest.raises(UserError) as caught:
        saver.restore(abstract(many))
    lines = str(caught.value).splitlines()
    assert len(lines) == 13 and lines[-1] == "  ... and 40 more"
    assert capfd.readouterr() == ("", "")


def test_missing_steps(open_folder, placed, mesh_of, abstract, tmp_path):
    state = placed(values(), mesh_of((8,)))
    reader = open_folder(read_only=True)
    assert reader.restore(abstract(state)) is None and reader.steps() == []
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ValueError, match="read-only"):
        reader.save(1, state, {})
    saver = open_folder()
    assert saver.restore(abstract(state)) is None
    saver.save(4, state, {})
    saver.wait()
    assert reader.steps() == [4]  # A reader sees what a writer adds.
    with pytest.raises(UserError, match=r"no step 3 in .*; there are steps \[4\]"):
        saver.restore(abstract(state), step=3)


def test_going_on_from_an_older_step(
    open_folder, placed, mesh_of, abstract, same_bits, tmp_path
):
    saver = open_folder(keep_last=3)
    old, new = (placed(values(seed), mesh_of((8,))) for seed in (0, 1))
    for step in (1, 2, 3):
        saver.save(step, old, {})
    restored = saver.restore(abstract(old), step=1)
    assert "steps [2, 3] are newer" in restored.notes[0]
    assert saver.steps() == [1, 2, 3]
    assert saver.save(2, new, {})
    saver.wait()
    assert saver.steps() == [1, 2]
    assert same_bits(saver.restore(abstract(old)).state, new)
    aside = tmp_path / "checkpoints" / "set_aside"
    assert sorted(p.name for p in aside.iterdir()) == ["2", "3"]


def test_targets_need_devices(open_folder, mesh_of):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(ValueError, match="w: needs a sharding on devices"):
        open_folder().restore({"w": shape})
    mesh = mesh_of((8,)).abstract_mesh
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="w: needs a sharding on devices"):
        open_folder().restore({"w": shape})


@pytest.mark.parametrize("tree", [{"a.b": 1}, {"a/b": 1}, {"": 1}, {1: 0, "1": 0}, 1])
def test_names_that_would_collide_on_disk(tree):
    with pytest.raises(ValueError, match=r"key|name"):
        trees.named_leaves(tree)


def test_another_format_is_refused(monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    contents = manifest.make(1, {}, {}, {}, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2; this version of moe_jax reads"):
        manifest.check(contents, 1)


def test_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint folder .*: .*Error"):
        Checkpoints(str(tmp_path / "file" / "x"), CheckpointConfig())


def test_normal_use_prints_nothing(tmp_path, python):
    code = f"""
import jax, jax.numpy as jnp
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import CheckpointConfig
x = {{"w": jnp.ones(8)}}
c = Checkpoints({str(tmp_path)!r}, CheckpointConfig(every=1))
for step in range(4): c.save(step, x, {{}})
c.restore(jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), x))
c.close()
"""
    process = python("-c", code)
    assert process.communicate() == ("", "")
    assert process.returncode == 0
