"""The optimizer's update one parameter after another.

All at once, the device would hold all moments in float32, old and new, where they are
kept on the host or in eight bits. So those of a parameter are taken up when those of
the one before are put away. With two parameters at a time, copies from the host would
hide those to it, but a stack of experts is a third of a model: Mixtral would need more
memory than without the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.nn.module import Params
from moe_jax.parallel import host
from moe_jax.train.state import TrainState, owner
from moe_jax.tree import named_leaves, path_name


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Params,
    state: TrainState,
    finite: jax.Array,
    *,
    on_host: bool,
) -> tuple[Params, Any]:
    """New parameters and optimizer state, the old ones where the step is not finite.

    Args:
      optimizer: that treats each parameter by itself: it does not clip.
      grads: like the trainable parameters, clipped.
      state: the state.
      finite: () bool.
      on_host: whether the optimizer's arrays lie in the memory of the host.
    """
    names, held = named_leaves(state.params), named_leaves(state.opt_state)
    owners = {name: owner(name, names) for name in held}
    params: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    back: Any = ()
    guard = lambda new, old: jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, old
    )
    for name in names:
        mine = {n: v for n, v in held.items() if owners[n] in (name, "")}
        mine, _ = jax.lax.optimization_barrier((mine, back))
        here = host.fetched(mine) if on_host else mine
        part = _with(state.opt_state, here)
        weight = _only(state.params, name)
        moved, after = optimizer.update(
            _only(grads, name), part, weight, step=state.step
        )
        weight = guard(optax.apply_updates(weight, moved), weight)
        after = guard(named_leaves(after), here)
        away = {n: host.sent(v) if on_host and v.ndim else v for n, v in after.items()}
        params[name] = named_leaves(weight)[name]
        kept |= away
        back = (away, params[name])
    return _with(state.params, params), _with(state.opt_state, kept)


def _only(tree: Any, name: str) -> Any:
    """A tree with one leaf and None for the others."""
    return _with(tree, {name: named_leaves(tree)[name]})


def _with(tree: Any, leaves: dict[str, Any]) -> Any:
    """A tree with these leaves by name and None for the others."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves.get(path_name(path)), tree
    )
