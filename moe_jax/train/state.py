"""The train state: everything that a checkpoint holds, and where each leaf lies."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import Config
from moe_jax.models.base import Model
from moe_jax.nn.module import Params
from moe_jax.parallel import host, rules
from moe_jax.train import moments, optimizers
from moe_jax.tree import named_leaves, path_name, struct


@struct
class TrainState:
    """State after `step` optimizer steps; nested dicts of arrays.

    Attributes:
      step: () int32.
      params: trainable parameters.
      frozen: parameters that never change.
      opt_state: of optax.
      router_state: what routers learn without gradients.
      ema: average of the trainable parameters, or None.
    """

    step: jax.Array
    params: Params
    frozen: Params
    opt_state: Any
    router_state: Any
    ema: Params | None

    @property
    def all_params(self) -> Params:
        return optimizers.merge(self.params, self.frozen)

    @property
    def eval_params(self) -> Params:
        """The averaged parameters where there are any."""
        averaged = self.params if self.ema is None else self.ema
        return optimizers.merge(averaged, self.frozen)


def init_state(
    config: Config, model: Model, optimizer: optax.GradientTransformation, key
) -> TrainState:
    """A fresh state; pure, to be jitted with `state_shardings`."""
    params, frozen = optimizers.split(config.optimizer, model.init(key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=optimizer.init(params),
        router_state=model.init_router_state(),
        ema=jax.tree.map(jnp.copy, params) if config.train.ema_decay else None,
    )


def state_shardings(state: TrainState, axes: Params, mesh: Mesh) -> TrainState:
    """Where each leaf of a state lies.

    A leaf of the optimizer state whose path ends in a parameter's path, and which has
    its shape, lies where the parameter lies; so does one with a number for each block
    of a dimension. All else is replicated: scalars, router state, and the factored
    moments of Adafactor.

    Args:
      state: abstract or concrete.
      axes: logical axes of all parameters.
      mesh: the mesh.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    is_axes = lambda v: isinstance(v, tuple)
    flat_axes = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)[0]
    }
    shapes = {
        name: leaf.shape
        for part in (state.params, state.frozen)
        for name, leaf in named_leaves(part).items()
    }

    def of_leaf(path, leaf):
        name = owner(path_name(path), shapes)
        whole = shapes.get(name)
        if whole and (leaf.shape == whole or moments.is_blocks(leaf.shape, whole)):
            return rules.sharding(mesh, flat_axes[name])
        return replicated

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def expert_dimensions(state: TrainState, axes: Params) -> dict[str, int]:
    """Which dimension of a leaf counts experts, by path name.

    Of the weights with an axis of experts, and of what belongs to one of them in its
    shape or by blocks of another dimension: averages and moments.

    Args:
      state: abstract or concrete.
      axes: logical axes of all parameters.
    """
    flat_axes = named_leaves(axes, is_leaf=lambda v: isinstance(v, tuple))
    places = {
        name: [rules.counts_experts(axis) for axis in axes].index(True)
        for name, axes in flat_axes.items()
        if any(map(rules.counts_experts, axes))
    }
    shapes = {
        name: leaf.shape
        for part in (state.params, state.frozen)
        for name, leaf in named_leaves(part).items()
    }
    found = {}
    for name, leaf in named_leaves(state).items():
        weight = owner(name, shapes)
        if weight not in places:
            continue
        dim, whole = places[weight], shapes[weight]
        same = leaf.shape == whole or moments.is_blocks(leaf.shape, whole)
        if same and leaf.shape[dim] == whole[dim]:
            found[name] = dim
    return found


def owner(name: str, params: Collection[str]) -> str:
    """The parameter that a leaf of this path name belongs to; "" if it is of none.

    Its path ends in the parameter's, the longest of those that do.
    """
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in params), "")


def abstract_state(
    config: Config, model: Model, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state; nothing is allocated."""
    make = lambda key: init_state(config, model, optimizer, key)
    key = jax.eval_shape(jax.random.key, 0)  # The mesh's devices may not be there.
    shapes = jax.eval_shape(make, key)
    shardings = state_shardings(shapes, model.axes, mesh)
    if config.train.offload_optimizer:
        place = lambda s, where: host.place(where) if s.ndim else where
        away = jax.tree.map(place, shapes.opt_state, shardings.opt_state)
        shardings = dataclasses.replace(shardings, opt_state=away)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        shapes,
        shardings,
    )
