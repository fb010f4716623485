"""One of two processes: `process.py RANK PORT FOLDER`."""

# ruff: noqa: I001
import shutil
import sys

import moe_jax  # noqa: F401  Before jax.
import jax
import numpy as np
from jax import P
from jax.sharding import AxisType, NamedSharding

from moe_jax.checkpoint import Checkpoints
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


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PORT}", 2, RANK)
    auto = (AxisType.Auto, AxisType.Auto)
    wide = jax.make_mesh((8, 1), ("a", "b"), axis_types=auto)
    square = jax.make_mesh((4, 2), ("a", "b"), axis_types=auto)
    saver = Checkpoints(FOLDER, CheckpointConfig(every=1, keep_last=3))
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
    saver.close()
    print("fine", RANK)


if __name__ == "__main__":
    main()
