"""The checkpoint's list of experts: the same on all meshes; damage is named by it."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

from moe_jax.checkpoint import Checkpoints, checksums, manifest
from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError

CONFIG = CheckpointConfig(every=1)
W, B = "params/layers/w_in", "params/b"
EXPERTS = {W: 1, B: 0}
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def values() -> dict:
    """Two stacked layers of eight experts, and a single layer of four."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "params": {"layers": {"w_in": draw(2, 8, 4, 6)}, "b": draw(4, 6)},
        "step": np.int32(1),
    }


def put(tree, mesh, **specs):
    place = lambda x, spec=P(): jax.device_put(x, NamedSharding(mesh, spec))
    return {
        "params": {
            "layers": {"w_in": place(tree["params"]["layers"]["w_in"], specs["w"])},
            "b": place(tree["params"]["b"], specs["b"]),
        },
        "step": place(tree["step"]),
    }


@pytest.fixture
def layouts(mesh_of):
    """The same state in four layouts."""
    tree = values()
    return {
        "one device": put(tree, mesh_of((1, 1)), w=P(), b=P()),
        "experts over a": put(tree, mesh_of((2, 4)), w=P(None, "a"), b=P("a")),
        "experts over both": put(
            tree, mesh_of((2, 4)), w=P(None, ("a", "b")), b=P("b", "a")
        ),
        "experts whole": put(tree, mesh_of((4, 2)), w=P("b", None, "a"), b=P()),
    }


def save(folder, state, experts=EXPERTS, step=1):
    saver = Checkpoints(str(folder), CONFIG, experts=experts)
    saver.save(step, state, {"position": step})
    saver.close()


def read(folder, target, **kwargs):
    reader = Checkpoints(str(folder), CONFIG, read_only=True)
    try:
        return reader.restore(target, **kwargs)
    finally:
        reader.close()


def contents_of(folder):
    return json.loads((folder / "1" / "manifest" / "data.json").read_text())


def rewrite(folder, change):
    """Changes the manifest and gives it a hash that fits."""
    found = contents_of(folder)
    del found["sha256"]
    change(found)
    found["sha256"] = manifest._hash(found)
    (folder / "1" / "manifest" / "data.json").write_text(json.dumps(found))


def test_equal_on_all_meshes_and_loads_on_all(layouts, tmp_path, abstract, same_bits):
    found = []
    for number, state in enumerate(layouts.values()):
        save(tmp_path / str(number), state)
        found.append(contents_of(tmp_path / str(number)))
    assert all(one == found[0] for one in found)
    w, b = (found[0]["experts"]["leaves"][name] for name in (W, B))
    assert (w["count"], w["dimension"], w["layers"]) == (8, 1, [2])
    assert (b["count"], b["dimension"], b["layers"]) == (4, 0, [])
    assert len(set(w["checksums"] + b["checksums"])) == 12
    first = layouts["one device"]
    for state in layouts.values():
        restored = read(tmp_path / "1", abstract(state))
        assert restored.notes == [] and same_bits(restored.state, first)


def test_sums_of_experts_by_hand():
    """Word by word, in Python's integers."""
    x = values()["params"]["b"]
    parts = checksums.in_parts({"b": jax.numpy.asarray(x)}, {"b": 0})["b"]
    assert (
        checksums.total(parts) == checksums.checksums({"b": jax.numpy.asarray(x)})["b"]
    )

    def finalize(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    words = x.view(np.uint32)
    for expert in range(4):
        low = high = 0
        for column in range(6):
            word = int(words[expert, column])
            h = finalize(word ^ finalize(6 * expert + column))
            low, high = low + h, high + finalize((h + 0x9E3779B9) % 2**32)
        assert parts[expert] == f"{high % 2**32:08x}{low % 2**32:08x}"


def damaged(folder, state, tmp_path, change):
    """The folder with other arrays under the manifest of `state`."""
    tree = jax.tree.map(np.array, state)
    change(tree["params"]["layers"]["w_in"])
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    save(folder, state)
    save(tmp_path / "other", put(tree, mesh, w=P(), b=P()))
    shutil.rmtree(folder / "1" / "state")
    shutil.copytree(tmp_path / "other" / "1" / "state", folder / "1" / "state")


def swap(w):
    w[:, [2, 5]] = w[:, [5, 2]]


def flip(w):
    w.view(np.uint32)[1, 6, 3, 5] ^= 1 << 17


def all_of_them(w):
    w += 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "experts 2, 5"),
        (flip, "expert 6"),
        (all_of_them, "experts 0, 1, 2, 3, 4, 5, 6, 7"),
    ],
)
@pytest.mark.parametrize("layout", ["one device", "experts over both"])
def test_damage_names_leaf_and_expert(
    change, said, layout, layouts, tmp_path, abstract
):
    folder = tmp_path / "checkpoints"
    damaged(folder, layouts[layout], tmp_path, change)
    target = abstract(layouts["experts over a"])
    with pytest.raises(UserError) as caught:
        read(folder, target)
    assert f"step 1 is damaged (leaf {W} ({said}): checksum differs)" in str(
        caught.value
    )


def test_old_checkpoints_load(layouts, tmp_path, abstract, same_bits):
    state = layouts["experts over a"]
    save(tmp_path, state)
    rewrite(tmp_path, lambda found: found.pop("experts"))
    restored = read(tmp_path, abstract(state))
    assert restored.notes == [] and same_bits(restored.state, state)


def set_entry(**values):
    return lambda found: found["experts"]["leaves"][W].update(values)


FAULTS = {
    "count": (set_entry(count=16), "lists 16 experts for layers [2], the array has 8"),
    "layers": (set_entry(layers=[]), "for layers [], the array has 8 for [2]"),
    "dimension": (set_entry(dimension=4), "has no dimension 4 of experts"),
    "negative": (set_entry(dimension=-3), "has no dimension -3 of experts"),
    "order": (set_entry(order="descending"), "experts lie in order 'descending'"),
    "short": (set_entry(checksums=["0" * 16]), "not one checksum for each of 8"),
    "number": (set_entry(checksums=[7] * 8), "an expert's checksum is not one"),
    "another sum": (set_entry(checksums=["0" * 16] * 8), "do not add up to its own"),
    "swapped leaf": (
        lambda f: f["experts"]["leaves"].update(x=f["experts"]["leaves"][W]),
        "experts of leaf 'x', which the manifest lacks",
    ),
    "no list": (lambda f: f.update(experts=[]), "list of experts is not one"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_list_is_one_clear_message(name, layouts, tmp_path, abstract):
    change, said = FAULTS[name]
    save(tmp_path, layouts["experts over a"])
    rewrite(tmp_path, change)
    with pytest.raises(UserError) as caught:
        read(tmp_path, abstract(layouts["experts over a"]), step=1)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_later_version_is_refused_by_name(layouts, tmp_path, abstract):
    save(tmp_path, layouts["experts over a"])
    rewrite(tmp_path, lambda found: found["experts"].update(version=2))
    with pytest.raises(UserError, match="experts in version 2; this version"):
        read(tmp_path, abstract(layouts["experts over a"]))


def test_another_layout_of_the_config(layouts, tmp_path, abstract):
    state = layouts["experts over a"]
    save(tmp_path, state)
    reader = Checkpoints(str(tmp_path), CONFIG, read_only=True, experts={W: 2})
    try:
        with pytest.raises(UserError, match="in dimension 1, this config in 2"):
            reader.restore(abstract(state))
    finally:
        reader.close()


def test_parts_of_the_state_are_verified_too(layouts, tmp_path, abstract):
    folder, state = tmp_path / "checkpoints", layouts["experts over a"]
    damaged(folder, state, tmp_path, flip)
    reader = Checkpoints(str(folder), CONFIG, read_only=True)
    target = abstract(state)["params"]
    try:
        with pytest.raises(UserError, match=r"leaf params/layers/w_in \(expert 6\)"):
            reader.restore_subtree(target["layers"], "params/layers")
        assert reader.restore_subtree(target["b"], "params/b").step == 1
    finally:
        reader.close()
