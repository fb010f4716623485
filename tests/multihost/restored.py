"""Prints a hash of every array of every checkpoint, restored over all processes.

restored.py WORKDIR EXPERT
"""

import hashlib
import json
import sys

from moe_jax.parallel import distributed
from moe_jax.train import workdir


def main(folder: str, expert: int) -> None:
    config = workdir.read_config(folder)
    config.mesh.expert = expert
    distributed.start(config.mesh)
    import numpy as np
    from jax.experimental import multihost_utils

    from moe_jax.checkpoint import Checkpoints, trees
    from moe_jax.train import setup

    parts = setup.make_parts(config)
    where = workdir.checkpoint_folder(folder, config)
    checkpoints = Checkpoints(where, config.checkpoint, read_only=True)
    hashes = {}
    for step in checkpoints.steps():
        state = checkpoints.restore(parts.abstract, step=step).state
        for name, leaf in trees.named_leaves(state).items():
            whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
            hashes[f"{step}/{name}"] = hashlib.sha256(whole.tobytes()).hexdigest()
    checkpoints.close()
    if distributed.is_primary():
        print(json.dumps(hashes), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
