"""A trained model from its workdir."""

import dataclasses
from typing import Any

from moe_jax.checkpoint import Checkpoints
from moe_jax.errors import UserError
from moe_jax.train import setup, workdir
from moe_jax.train.setup import Parts
from moe_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Attributes: parts of the run, its state, and lines for the user."""

    parts: Parts
    state: TrainState
    notes: list[str]


def load(folder: str, config: Any, step: int = 0) -> Loaded:
    """Restores a run onto the mesh of `config`.

    Args:
      folder: the workdir.
      config: as `workdir.read_config` gave it, with another mesh where wanted.
      step: which checkpoint; 0: the newest good one.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    parts = setup.make_parts(config)
    where = workdir.checkpoint_folder(folder, config)
    checkpoints = Checkpoints(where, config.checkpoint, read_only=True)
    try:
        found = checkpoints.restore(parts.abstract, step=step or None)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"--workdir={folder}: there is no checkpoint yet")
    notes = [*found.notes, f"checkpoint of step {found.step}"]
    return Loaded(parts=parts, state=found.state, notes=notes)
