"""Where a run begins: at its last checkpoint, at another run's parameters, or fresh."""

from typing import Any

import jax

from moe_jax import models
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.models.base import RouterState
from moe_jax.nn.module import Params
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
    saved = found.data.get("content_hash", data.content_hash)  # Imported: none yet.
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
    params, router_state, notes = load_model(parts, source)
    return setup.state_from(parts, params, router_state), notes


def load_model(parts: Parts, source: str) -> tuple[Params, RouterState, list[str]]:
    """Another run's parameters and router state, on this run's mesh.

    Of its newest good checkpoint. A router state of another shape begins afresh.

    Returns:
      All parameters, the router state, and lines for the user.

    Raises:
      UserError: no checkpoint there, or other shapes.
    """
    other = workdir.read_config(source)
    folder = workdir.checkpoint_folder(source, other)
    trainable, frozen = optimizers.split(other.optimizer, parts.abstract.all_params)
    checkpoints = Checkpoints(folder, other.checkpoint, read_only=True)
    try:
        found = checkpoints.restore_subtree(trainable, "params")
        if found is None:
            raise UserError(f"{source}: no checkpoint to take parameters from")
        params = found.state
        if frozen:
            rest = checkpoints.restore_subtree(frozen, "frozen", step=found.step)
            params = optimizers.merge(params, rest.state)
        if _router_shapes(other) != _router_shapes(parts.config):
            note = f"parameters from {source}; its router state is another, so not that"
            return params, setup.fresh_router_state(parts), [note]
        router_state = parts.abstract.router_state
        if jax.tree.leaves(router_state):
            rest = checkpoints.restore_subtree(
                router_state, "router_state", step=found.step
            )
            router_state = rest.state
        return params, router_state, [f"parameters from {source}"]
    finally:
        checkpoints.close()


def _router_shapes(config: Config) -> Any:
    state = jax.eval_shape(models.build(config.model).init_router_state)
    return jax.tree.map(lambda leaf: leaf.shape, state)
