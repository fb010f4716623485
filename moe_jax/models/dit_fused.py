"""Experts fused for one time: where routers see the time alone, a dense model is left.

MoDE (Reuss et al. 2024, arXiv:2412.12953). At one time all tokens have the same K
experts with the same weights: side by side they are one feed-forward of width K F. A
sampler that visits few times runs `dense_model` with weights by `fuse` for each.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.models.base import RouterState
from moe_jax.models.dit import DiTModel
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.route import route
from moe_jax.moe.routing import EVAL, Array, Condition, Tokens
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.module import Params
from moe_jax.parallel import rules

# Each token takes K experts, whatever the other tokens are.
_SELECTORS = (TopK, GroupLimited)


def _problem(ff: MoE | object) -> str:
    """What keeps a feed-forward from being fused; "" where nothing does."""
    if not isinstance(ff, MoE):
        return f"{type(ff).__name__} has no experts"
    selectors = " or ".join(cls.__name__ for cls in _SELECTORS)
    if not ff.scorer.by_time:
        return (
            f"scorer={type(ff.scorer).__name__} scores more than the time; only one "
            "such as Timestep or TimestepMLP sends all tokens to the same experts"
        )
    if not isinstance(ff.selector, _SELECTORS):
        return (
            f"selector={type(ff.selector).__name__} does not give every token its own "
            f"K experts; take {selectors}"
        )
    if type(ff.experts) is not ExpertFeedForward:
        return f"experts={type(ff.experts).__name__} are no ExpertFeedForward"
    if ff.first_dense or ff.every > 1:
        return (
            f"first_dense={ff.first_dense} and every={ff.every}: some blocks are "
            "dense, and of another kind than the fused ones"
        )
    if ff.shared_gate:
        return "shared_gate=True weighs the shared experts token by token"
    return ""


def dense_model(model: DiTModel) -> DiTModel:
    """The model of fused experts: a `Dense` of width K F, plus that of shared experts.

    Raises:
      UserError: what cannot be fused.
    """
    ff = model.options.feed_forward
    if problem := _problem(ff):
        raise UserError(f"config.model.feed_forward cannot be fused: {problem}")
    width = ff.selector.top_k * ff.experts.d_ff + ff.shared_d_ff
    return DiTModel(dataclasses.replace(model.options, feed_forward=ff.dense(width)))


def fuse(
    model: DiTModel, params: Params, router_state: RouterState, time: Array
) -> Params:
    """Weights of `dense_model` that do at one time what the experts do.

    Args:
      model: with experts.
      params: its weights.
      router_state: its routers' state.
      time: (), as the network sees it; that of all images of the call.

    Returns:
      The dense model's weights; those outside the experts are as they were.

    Raises:
      UserError: what cannot be fused.
    """
    dense = dense_model(model)
    ((segment, seg),) = model._named_segments()
    ((block, kind),) = seg.named_blocks()
    layers = params[segment][block]
    tokens = _one_token(model, params, time)

    def of_layer(weights, state):
        scorer = model._block[kind].bind(weights).moe.scorer
        selector = model.options.feed_forward.selector
        routing, _ = route(
            scorer, None, selector, tokens, state, None, None, EVAL, None
        )
        weight_k = jnp.where(routing.valid_tk, routing.weight_tk, 0)[0]
        return _side_by_side(weights["moe"], routing.expert_tk[0], weight_k)

    made = jax.vmap(of_layer)(layers, router_state[segment][block])
    axes = dense.axes[segment][block]["feed_forward"]
    made = {name: rules.constrain(w, *axes[name]) for name, w in made.items()}
    kept = {name: part for name, part in layers.items() if name != "moe"}
    return params | {segment: {block: kept | {"feed_forward": made}}}


def _one_token(model: DiTModel, params: Params, time: Array) -> Tokens:
    """A token as the routers see all of them at this time."""
    time = jnp.reshape(time, (1,))
    embedding = model._bound_outer(params).embed_times(time)
    return Tokens(
        features=embedding,
        valid=jnp.ones(1, bool),
        batch_shape=(1, 1),
        condition=Condition(time=time, time_embedding=embedding, embedding=embedding),
    )


def _side_by_side(moe: Params, expert_k: Array, weight_k: Array) -> Params:
    """One feed-forward of a layer's chosen experts, weighed, and its shared ones."""
    found = {}
    for name, stacked in moe["experts"].items():
        parts = list(stacked[expert_k])
        if name in ("w_down", "b_down"):
            scale = moe.get("output_scale", 1.0)
            weighed = zip(parts, weight_k.astype(stacked.dtype), strict=True)
            parts = [part * weight * scale for part, weight in weighed]
        if "shared" in moe:
            parts.append(moe["shared"][name])
        if name == "b_down":
            found[name] = sum(parts)
        else:
            found[name] = jnp.concatenate(parts, axis=-2 if name == "w_down" else -1)
    return found
