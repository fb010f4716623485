"""Where a run begins: at its last checkpoint, at another run's parameters, or fresh."""

import dataclasses
from typing import Any

import jax

from moe_jax.checkpoint import Checkpoints
from moe_jax.errors import UserError
from moe_jax.train import optimizers, setup, workdir
from moe_jax.train.setup import Parts
from moe_jax.train.state import TrainState


def data_position(parts: Parts, data: Any, step: int) -> dict[str, Any]:
    """What a checkpoint says about the data: enough to find the next example."""
    config = parts.config
    return {
        "step": step,
        "rows": step * config.train.batch_size,
        "seed": config.seed,
        "content_hash": data.content_hash,
    }


def begin(
    parts: Parts, data: Any, checkpoints: Checkpoints
) -> tuple[TrainState, list[str], dict[str, Any]]:
    """The state to go on from, lines for the user, and what was saved beside it.

    Raises:
      UserError: the checkpoint is of other data or shapes, or none of them is good.
    """
    found = checkpoints.restore(parts.abstract)
    if found is None:
        return *_fresh(parts), {}
    saved = found.data.get("content_hash")
    if saved != data.content_hash:
        raise UserError(
            "the text is not the one this run was trained on (its content hash was "
            f"{str(saved)[:12]}, now {data.content_hash[:12]}), so it cannot go on "
            "exactly; bring back the text, or begin a new workdir with "
            "--config.train.warm_start"
        )
    return found.state, [*found.notes, f"going on from step {found.step}"], found.data


def _fresh(parts: Parts) -> tuple[TrainState, list[str]]:
    source = parts.config.train.warm_start
    if not source:
        return setup.fresh_state(parts), []
    params = load_params(parts, source)
    state = setup.fresh_state(parts)
    trainable, frozen = optimizers.split(parts.config.optimizer, params)
    # A copy: the step donates both.
    ema = None if state.ema is None else jax.tree.map(lambda a: a.copy(), trainable)
    state = dataclasses.replace(state, params=trainable, frozen=frozen, ema=ema)
    return state, [f"parameters from {source}"]


def load_params(parts: Parts, source: str) -> Any:
    """All parameters of another run's newest good checkpoint, on this run's mesh.

    Raises:
      UserError: no checkpoint there, or other shapes.
    """
    other = workdir.read_config(source)
    folder = workdir.checkpoint_folder(source, other)
    with_frozen = optimizers.merge(parts.abstract.params, parts.abstract.frozen)
    trainable, frozen = optimizers.split(other.optimizer, with_frozen)
    checkpoints = Checkpoints(folder, other.checkpoint, read_only=True)
    try:
        params = checkpoints.restore_subtree(trainable, "params")
        if params is None:
            raise UserError(f"{source}: no checkpoint to take parameters from")
        if frozen:
            rest = checkpoints.restore_subtree(frozen, "frozen", step=params.step)
            return optimizers.merge(params.state, rest.state)
        return params.state
    finally:
        checkpoints.close()
