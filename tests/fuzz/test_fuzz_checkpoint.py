"""A checkpoint with files changed on disk: the same bits, an older step, a message."""

import json
import pathlib
import shutil

import hypothesis
import jax
import mutations
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.checkpoint import Checkpoints, manifest
from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError

CONFIG = CheckpointConfig(every=1)
EXPERTS = {"params/w": 1}
pytestmark = pytest.mark.filterwarnings("ignore")


def state_at(step):
    rng = np.random.default_rng(step)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tree = {"params": {"w": draw(2, 4, 3), "b": draw(5)}, "step": np.int32(step)}
    return jax.device_put(tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2, and the contents of the files of step 2."""
    folder = tmp_path_factory.mktemp("damage") / "checkpoints"
    saver = Checkpoints(str(folder), CONFIG, experts=EXPERTS)
    for step in (1, 2):
        saver.save(step, state_at(step), {"step": step})
    saver.close()
    files = {
        str(path.relative_to(folder / "2")): path.read_bytes()
        for path in sorted((folder / "2").rglob("*"))
        if path.is_file()
    }
    return folder, files


def restore(folder, target):
    reader = Checkpoints(str(folder), CONFIG, read_only=True, experts=EXPERTS)
    try:
        return reader.restore(target)
    finally:
        reader.close()


def changed(draw, name, content):
    if name == "manifest/data.json" and draw(st.booleans()):
        found = draw(mutations.json_values(json.loads(content)))
        if isinstance(found, dict):  # By one who knows how to hash it.
            found.pop("sha256", None)
            found["sha256"] = manifest._hash(found)
        return json.dumps(found).encode()
    try:
        return draw(mutations.json_files(json.loads(content)))
    except ValueError:
        return draw(mutations.byte_strings(content))


@mutations.settings(15)
@hypothesis.given(data=st.data())
def test_changed_files(data, saved, clear):
    folder, files = saved
    outside = sorted(str(p) for p in folder.parent.iterdir())
    picked = data.draw(
        st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)
    )
    try:
        for name in picked:
            (folder / "2" / name).write_bytes(changed(data.draw, name, files[name]))
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            state_at(0),
        )
        found = clear(lambda: restore(folder, target))
        if found is not None:
            assert found.step in (1, 2)
            assert (found.step == 1) == bool(found.notes)
            for got, want in zip(
                jax.tree.leaves(found.state),
                jax.tree.leaves(state_at(found.step)),
                strict=True,
            ):
                assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
        assert sorted(str(p) for p in folder.parent.iterdir()) == outside
    finally:
        for name in picked:
            (folder / "2" / name).write_bytes(files[name])


def test_a_link_out_of_the_folder_is_read_like_a_file_and_verified(saved, tmp_path):
    """What lies at its end must be the array that the manifest has sums of."""
    folder, _ = saved
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    for path in (copy / "2" / "state" / "d").iterdir():
        other = tmp_path / path.name
        other.write_bytes(path.read_bytes()[::-1])
        path.unlink()
        path.symlink_to(other)
    reader = Checkpoints(str(copy), CONFIG, read_only=True)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state_at(0),
    )
    try:
        assert reader.restore(target).step == 1
        with pytest.raises(UserError, match="step 2 is damaged"):
            reader.restore(target, step=2)
    finally:
        reader.close()
    assert pathlib.Path(tmp_path / "checkpoints" / "2").exists()
