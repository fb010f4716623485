"""A trained model from its workdir."""

import dataclasses

import jax

from moe_jax.checkpoint import Checkpoints, Restored
from moe_jax.config import Config
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


def load(folder: str, config: Config, step: int = 0, content_hash: str = "") -> Loaded:
    """Restores what scoring and writing need of a run onto the mesh of `config`.

    That is the averaged parameters where there are any, else the parameters, and the
    router state. The optimizer's state is not read.

    Args:
      folder: the workdir.
      config: as `workdir.read_config` gave it, with another mesh where wanted.
      step: which checkpoint; 0: the newest good one.
      content_hash: of the text to be scored, if any.

    Raises:
      UserError: there is no checkpoint, it is damaged, or it was trained on another
        text, whose training part may hold what is held out now.
    """
    setup.use_compilation_cache(config)
    parts = setup.make_parts(config)
    where = workdir.checkpoint_folder(folder, config)
    checkpoints = Checkpoints(where, config.checkpoint, read_only=True)
    try:
        found = _restore(checkpoints, parts.abstract, step)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"--workdir={folder}: there is no checkpoint yet")
    # One that was imported and not yet trained has seen no text.
    trained_on = found.data.get("content_hash", content_hash)
    if content_hash and trained_on != content_hash:
        raise UserError(
            f"--workdir={folder}: the text is not the one this run was trained on "
            f"(content hash {str(trained_on)[:12]} then, {content_hash[:12]} now), so "
            "what is held out now may have been trained on; bring back the text (for "
            "python_source: the same Python)"
        )
    notes = [*found.notes, f"checkpoint of step {found.step}"]
    return Loaded(parts=parts, state=found.state, notes=notes)


def _restore(
    checkpoints: Checkpoints, abstract: TrainState, step: int
) -> Restored | None:
    """The state without that of the optimizer, part by part, all of one step."""
    averaged = abstract.ema is not None
    first = "ema" if averaged else "params"
    found = checkpoints.restore_subtree(
        getattr(abstract, first), first, step=step or None
    )
    if found is None:
        return None
    loaded = {first: found.state}
    for name in ("step", "frozen", "router_state"):
        loaded[name] = part = getattr(abstract, name)
        if jax.tree.leaves(part):
            rest = checkpoints.restore_subtree(part, name, step=found.step)
            loaded[name] = rest.state
    empty = dict(params={}, ema=None, opt_state=None)
    return dataclasses.replace(found, state=TrainState(**empty | loaded))
