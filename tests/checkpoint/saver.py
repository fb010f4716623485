"""A training run for the crash tests: `saver.py FOLDER full_disk|endless`."""

import resource
import sys

import jax
import numpy as np

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import CheckpointConfig
from moe_jax.errors import RunError


def state_at(step: int) -> dict:
    rng = np.random.default_rng(step)
    tree = {f"w{i}": rng.normal(size=(256, 512)).astype(np.float32) for i in range(4)}
    return jax.device_put(tree | {"step": np.int32(step)})


def target() -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state_at(0),
    )


def check(restored) -> None:
    want = state_at(restored.step)
    assert all(np.array_equal(restored.state[k], want[k]) for k in want)
    assert restored.data == {"position": restored.step}


def endless(checkpoints: Checkpoints) -> None:
    """Goes on where the last run stopped, until it is killed."""
    restored = checkpoints.restore(target())
    step = 0
    if restored is not None:
        check(restored)
        assert restored.notes == [], restored.notes
        step = restored.step
    print("at", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), {"position": step})


def full_disk(checkpoints: Checkpoints) -> None:
    """Files cannot grow any more while step 2 is written."""
    checkpoints.save(1, state_at(1), {"position": 1})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    for report in (checkpoints.wait, lambda: checkpoints.save(3, state_at(3), {})):
        try:
            checkpoints.save(2, state_at(2), {"position": 2})
            while checkpoints.is_saving():
                pass
            report()
        except RunError as error:
            print(error)
        else:
            print("no error")
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, resource.RLIM_INFINITY))
    restored = checkpoints.restore(target())
    check(restored)
    print("restored", restored.step, checkpoints.steps())
    checkpoints.save(2, state_at(2), {"position": 2})
    checkpoints.wait()
    check(checkpoints.restore(target()))
    print("steps", checkpoints.steps())
    checkpoints.close()


if __name__ == "__main__":
    opened = Checkpoints(sys.argv[1], CheckpointConfig(every=1, keep_last=2))
    {"endless": endless, "full_disk": full_disk}[sys.argv[2]](opened)
