"""Damaged files: what is loaded is what was saved, or an older step, or an error."""

import shutil

import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints, store
from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError

CONFIG = CheckpointConfig(every=20)
# Orbax leaves tasks on a closed event loop when it cannot read a file.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def tree(kind: str, step: int) -> dict:
    size = 16 * 1024
    ramp = np.arange(size, dtype=np.float32) + step
    normal = np.random.default_rng(step).normal(size=size).astype(np.float32)
    x = {"ramp": ramp, "normal": normal}[kind].reshape(16, -1)
    return {"params": {"x": x}, "step": np.int32(step)}


@pytest.fixture
def saved(tmp_path, mesh_of, placed):
    """Saves steps 20 and 40 of a tree; returns their folder and both states."""

    def make(kind="normal"):
        folder = tmp_path / "checkpoints"
        saver = Checkpoints(str(folder), CONFIG)
        states = {s: placed(tree(kind, s), mesh_of((2, 4))) for s in (20, 40)}
        for step, state in states.items():
            saver.save(step, state, {"position": step})
        saver.close()
        return folder, states

    return make


@pytest.fixture
def restore(mesh_of, placed, abstract):
    """Restores from a folder, onto another mesh than that of `saved`."""

    def run(folder, read_only=True, **kwargs):
        reader = Checkpoints(str(folder), CONFIG, read_only=read_only)
        try:
            target = abstract(placed(tree("ramp", 0), mesh_of((8,))))
            return reader.restore(target, **kwargs)
        finally:
            reader.close()

    return run


def array_files(folder):
    return sorted(p for p in folder.rglob("d/*") if p.is_file())


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def flip_bits(folder, restore, flips=20):
    """Flips one bit at a time in the array data; yields what is restored."""
    files = array_files(folder / "40" / "state")
    sizes = np.array([p.stat().st_size for p in files])
    rng = np.random.default_rng(0)
    for _ in range(flips):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        yield restore(folder)
        flip(path, bit)


@pytest.mark.parametrize("kind", ["ramp", "normal"])
def test_flipped_bits(kind, saved, restore, same_bits):
    folder, states = saved(kind)
    detected = 0
    for restored in flip_bits(folder, restore):
        detected += restored.step == 20
        assert len(restored.notes) == (restored.step == 20)
        assert same_bits(restored.state, states[restored.step])
    assert detected >= 15
    control = restore(folder)
    assert control.step == 40 and control.notes == []
    assert same_bits(control.state, states[40])


def test_flips_would_pass_without_checksums(monkeypatch, saved, restore, same_bits):
    monkeypatch.setattr(
        store, "in_parts", lambda leaves, dims: {k: ["0" * 16] for k in leaves}
    )
    folder, states = saved()
    found = list(flip_bits(folder, restore, 5))
    assert any(r.step == 40 and not same_bits(r.state, states[40]) for r in found)


def test_falls_back_with_a_note(monkeypatch, tmp_path, mesh_of, placed, restore):
    saver = Checkpoints(str(tmp_path), CONFIG)
    states = {s: placed(tree("ramp", s), mesh_of((2, 4))) for s in (20, 40)}
    saver.save(20, states[20], {"position": 20})
    real = store.in_parts
    monkeypatch.setattr(
        store,
        "in_parts",
        lambda *given: {k: [v[0][::-1]] for k, v in real(*given).items()},
    )
    saver.save(40, states[40], {"position": 40})
    monkeypatch.undo()
    saver.close()
    restored = restore(tmp_path)
    assert restored.step == 20 and restored.data == {"position": 20}
    assert restored.notes == [
        "step 40 is damaged (leaf params/x and 1 more: checksum differs); using step 20"
    ]
    with pytest.raises(UserError, match=r"step 40 is damaged .*steps \[20, 40\]"):
        restore(tmp_path, step=40)


@pytest.mark.parametrize("times", [1, 2])
def test_training_goes_on_over_a_damaged_step(
    times, saved, mesh_of, placed, abstract, same_bits
):
    folder, states = saved()
    for attempt in range(times):
        shutil.rmtree(folder / "40" / "manifest")
        saver = Checkpoints(str(folder), CONFIG)
        restored = saver.restore(abstract(states[20]))
        assert restored.step == 20 and "step 40 is damaged" in restored.notes[0]
        assert saver.steps() == [20, 40]  # Restoring alone changes nothing.
        new = placed(tree("ramp", 100 + attempt), mesh_of((2, 4)))
        assert saver.save(40, new, {"attempt": attempt})
        saver.wait()
        restored = saver.restore(abstract(new))
        assert same_bits(restored.state, new) and restored.notes == []
        assert restored.step == 40 and restored.data == {"attempt": attempt}
        saver.close()
    aside = sorted(p.name for p in (folder / "set_aside").iterdir())
    assert aside == ["40", "40.1"][:times]


def test_a_damaged_step_does_not_count_as_kept(saved, abstract):
    folder, states = saved()
    shutil.rmtree(folder / "40" / "manifest")
    saver = Checkpoints(str(folder), CheckpointConfig(every=20, keep_last=1))
    saver.restore(abstract(states[20]))
    # If the damaged 40 counted, it would be the one that is kept.
    assert saver.save(30, states[20], {}, force=True)
    saver.wait()
    assert saver.steps() == [30]
    saver.close()


FILES = [
    "manifest/data.json",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/d/*",
]


@pytest.mark.parametrize("how", ["truncate", "remove", "garbage"])
@pytest.mark.parametrize("pattern", FILES)
def test_broken_files(how, pattern, saved, restore, same_bits):
    folder, states = saved()
    for path in (folder / "40").glob(pattern):
        data = path.read_bytes()
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            path.write_bytes(data[: len(data) // 2])
        else:
            path.write_bytes(bytes(reversed(data)))
    restored = restore(folder)
    assert restored.step == 20 and "step 40 is damaged" in restored.notes[0]
    assert same_bits(restored.state, states[20])


def test_changed_manifest_is_noticed(saved, restore):
    folder, _ = saved()
    path = folder / "40" / "manifest" / "data.json"
    path.write_text(path.read_text().replace('"position": 40', '"position": 41'))
    restored = restore(folder)
    assert restored.data == {"position": 20}
    assert "the manifest's checksum differs" in restored.notes[0]


def test_step_under_another_name_is_noticed(saved, restore):
    folder, _ = saved()
    (folder / "40").rename(folder / "60")
    assert "its manifest is that of step 40" in restore(folder).notes[0]


def test_all_damaged(saved, restore):
    folder, _ = saved()
    for step in ("20", "40"):
        (folder / step / "manifest" / "data.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        restore(folder)
    lines = str(caught.value).splitlines()
    assert "every checkpoint" in lines[0] and str(folder) in lines[0]
    assert lines[1].startswith("  step 40 is damaged (")
    assert lines[2].startswith("  step 20 is damaged (")


@pytest.mark.parametrize("name", ["20", "40", "60"])
def test_empty_folders_and_leftovers(name, tmp_path, mesh_of, placed, abstract):
    state = placed(tree("ramp", 1), mesh_of((2, 4)))
    (tmp_path / "99.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / name).mkdir()
    saver = Checkpoints(str(tmp_path), CheckpointConfig(every=20, keep_last=1))
    assert saver.steps() == [] and saver.restore(abstract(state)) is None
    for step in (20, 40):
        assert saver.save(step, state, {})
    saver.wait()
    assert saver.steps() == [40]
    assert saver.restore(abstract(state)).step == 40
    saver.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["40", "notes"]


def test_reader_passes_over_an_empty_folder(saved, restore):
    folder, _ = saved()
    (folder / "60").mkdir()
    restored = restore(folder)
    assert restored.step == 40 and restored.notes == []
    assert (folder / "60").exists()


# Damaged metadata of step 40, and which step a reader gets: none, where Orbax cannot
# list them.
UNLISTABLE = {
    "1e308": None,
    "[]": None,
    '{"metrics": 7}': None,
    '{"custom_metadata": {"a": 1}, "b": 2}': None,
    '{"item_handlers": "a"}': 20,
    "{": 40,
    "\0": 40,
}


@pytest.mark.parametrize("text, step", UNLISTABLE.items())
def test_a_reader_tells_of_metadata_that_keeps_steps_from_being_listed(
    text, step, saved, restore
):
    """Orbax reads it of every step; without it, it goes on."""
    folder, _ = saved()
    path = folder / "40" / "_CHECKPOINT_METADATA"
    path.write_text(text)
    if step:
        assert restore(folder).step == step
    else:
        with pytest.raises(UserError) as caught:
            restore(folder)
        assert f"{path} is damaged; delete it" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_text() == text
    path.unlink()
    restored = restore(folder)
    assert restored.step == 40 and restored.notes == []


@pytest.mark.parametrize("text", UNLISTABLE)
def test_a_writer_renames_metadata_and_goes_on(text, saved, restore):
    folder, _ = saved()
    path = folder / "40" / "_CHECKPOINT_METADATA"
    path.write_text(text)
    unfinished = folder / "60.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / path.name).touch()  # It has none yet.
    restored = restore(folder, read_only=False)
    assert restored.step == 40
    assert restored.notes == [
        f"{path} was damaged and is renamed; the step is read without it"
    ]
    assert not path.exists() and path.with_name(f"{path.name}.damaged").exists()
    assert restore(folder, read_only=False).notes == []


UNUSUAL = [
    "{}",
    '{"metrics": null, "item_handlers": null, "commit_timestamp_nsecs": null}',
    '{"performance_metrics": null, "custom_metadata": {"a": 1}}',
    '{"of_a_later_version": 1}',
]


@pytest.mark.parametrize("text", UNUSUAL)
def test_what_orbax_reads_is_left_alone(text, saved, restore):
    folder, _ = saved()
    path = folder / "40" / "_CHECKPOINT_METADATA"
    path.write_text(text)
    for read_only in (True, False):
        restored = restore(folder, read_only=read_only)
        assert restored.step == 40 and restored.notes == []
    assert path.read_text() == text


def test_a_leaf_that_the_index_lacks(saved, restore):
    """Orbax gives back the target in its place."""
    folder, _ = saved()
    path = folder / "40" / "state" / "_METADATA"
    path.write_text(path.read_text().replace('"key": "step"', '"key": "stop"'))
    restored = restore(folder)
    assert restored.step == 20
    assert "leaf step is not among its arrays" in restored.notes[0]
