"""A workdir whose first checkpoint comes from elsewhere."""

import os
from typing import Any

import jax

from moe_jax.checkpoint import Checkpoints
from moe_jax.convert import mapping
from moe_jax.parallel import distributed
from moe_jax.train import setup, workdir
from moe_jax.train.setup import Parts


def save(parts: Parts, found: dict[str, Any], made: str, imported: str) -> None:
    """Writes config and checkpoint of step 0, the optimizer as it begins.

    Args:
      parts: of the run.
      found: arrays of `load.arrays`, which are used up.
      made: the folder, which exists.
      imported: where they come from, for the record.
    """
    router_state = jax.tree.unflatten(
        jax.tree.structure(parts.abstract.router_state),
        jax.tree.leaves(found.get(mapping.STATE, {})),
    )
    state = setup.state_from(parts, found[mapping.PARAMS], router_state)
    checkpoints = Checkpoints(
        workdir.checkpoint_folder(made, parts.config),
        parts.config.checkpoint,
        experts=parts.experts,
    )
    # No content hash: it has seen no data of ours.
    beside = {"step": 0, "rows": 0, "imported": os.path.abspath(imported)}
    try:
        checkpoints.save(0, state, beside, force=True)
    finally:
        checkpoints.close()
    if distributed.is_primary():
        workdir.claim(made, parts.config)
