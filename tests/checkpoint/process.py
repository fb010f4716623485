"""One of two processes: `process.py RANK PORT FOLDER`."""

# ruff: noqa: I001
import pathlib
import resource
import shutil
import signal
import sys
import time

import moe_jax  # noqa: F401  Before jax.
import jax
import numpy as np
from jax import P
from jax.sharding import AxisType, NamedSharding

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.failures import SaveError
from moe_jax.config import CheckpointConfig

RANK, PORT, FOLDER = int(sys.argv[1]), sys.argv[2], sys.argv[3]


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def state(mesh: jax.sharding.Mesh, spec: P, scale: int) -> dict:
    x = np.arange(64, dtype=np.float32).reshape(16, 4) * scale
    return {
        "x": place(x, NamedSharding(mesh, spec)),
        "step": place(np.array(scale), NamedSharding(mesh, P())),
    }


def fail(saver: Checkpoints, step: int, tree: dict, rank: int) -> None:
    """One process cannot write its part: it hears of it at once; then it is saved."""
    out = pathlib.Path(f"{FOLDER}.{step}")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if RANK == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    saver.save(step, tree, {})
    try:
        saver.wait()
        raise AssertionError("no error")
    except SaveError as error:
        assert ("Errno" in str(error)) == (RANK == rank), error
    if RANK == rank:
        time.sleep(1)
        assert not out.exists(), "it has waited for the other, which waits for it"
    out.touch()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    jax.experimental.multihost_utils.sync_global_devices(f"free {step}")
    assert step not in saver.steps()
    saver.save(step, tree, {})
    saver.wait()
    assert step in saver.steps()


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PORT}", 2, RANK)
    auto = (AxisType.Auto, AxisType.Auto)
    wide = jax.make_mesh((8, 1), ("a", "b"), axis_types=auto)
    square = jax.make_mesh((4, 2), ("a", "b"), axis_types=auto)
    saver = Checkpoints(
        FOLDER, CheckpointConfig(every=1, keep_last=3, watchdog_secs=20)
    )
    for step in (1, 2):
        saver.save(step, state(wide, P("a"), step), {"position": step})
    saver.wait()
    if RANK == 0:
        shutil.rmtree(f"{FOLDER}/2/manifest")
    jax.experimental.multihost_utils.sync_global_devices("damaged")

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state(square, P("b", "a"), 0),
    )
    restored = saver.restore(target)
    assert restored.step == 1 and len(restored.notes) == 1, restored
    saver.save(2, state(wide, P("a"), 5), {"position": 5})
    restored = saver.restore(target)
    assert restored.step == 2 and restored.data == {"position": 5}, restored
    want = state(square, P("b", "a"), 5)
    for name, leaf in restored.state.items():
        for a, b in zip(
            leaf.addressable_shards, want[name].addressable_shards, strict=True
        ):
            np.testing.assert_array_equal(a.data, b.data)
    fail(saver, 3, state(wide, P("a"), 3), rank=1)
    fail(saver, 4, state(wide, P("a"), 4), rank=0)
    saver.close()
    print("fine", RANK)


if __name__ == "__main__":
    main()
