"""The MoE layer: score, select, dispatch to experts, combine; beside it shared experts.

Scoring, selection and balance run in the global view; one `jax.shard_map` holds the
dispatch and the experts. Without a mesh (`jax.set_mesh`) the same code runs on the
tokens at hand, so the layer can be used in any model.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe import balance, capabilities, health, mixing, route, sharded
from moe_jax.moe import state as router
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.experts import EXPERTS
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.noises import NOISES
from moe_jax.moe.routing import (
    TRAIN,
    Array,
    DispatchStats,
    Mixing,
    Mode,
    MoEAux,
    Override,
    Routing,
    Tokens,
    among,
)
from moe_jax.moe.scorers import SCORERS
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors import LOSSES, WEIGHTS
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn import feedforward, module
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import AXES


@config.node
class MoE(config.FeedForwardConfig):
    """Mixture-of-Experts feed-forwards in some or all blocks.

    Attributes:
      num_experts: E, routed experts.
      experts: their kind and width.
      expert_axes: mesh axes over which the experts are split; "expert" among them. An
        axis in this list splits experts in place of what else it splits in them:
        "fsdp" their D, "tensor" their F.
      shared_d_ff: width of the shared experts together, on every token; 0: none.
      shared_gate: weigh their output by `sigmoid(x w)`, one w (Qwen2-MoE).
      scorer: tokens to logits.
      selector: logits to a routing.
      balance: losses and bias.
      dispatch: how rows reach their experts.
      noise: in the router, in training only; None: none.
      output_scale: a learned factor per channel on the routed experts' output,
        initially 1 (SparseMixer's omega).
      allow_noncausal: accept a selector that looks at later tokens in a model that
        predicts them.
      first_dense: blocks at the bottom that stay dense.
      every: of the blocks above, each n-th (the last of n) is MoE.
      dense_d_ff: width of the dense blocks; needed where there are any.
    """

    num_experts: int = 8
    experts: config.ExpertsConfig = dataclasses.field(default_factory=ExpertFeedForward)
    expert_axes: tuple[str, ...] = ("expert",)
    shared_d_ff: int = 0
    shared_gate: bool = False
    scorer: config.ScorerConfig = dataclasses.field(default_factory=Linear)
    selector: config.SelectorConfig = dataclasses.field(default_factory=TopK)
    balance: Balance = dataclasses.field(default_factory=Balance)
    dispatch: config.DispatchConfig = dataclasses.field(default_factory=Exact)
    noise: config.NoiseConfig | None = None
    output_scale: bool = False
    allow_noncausal: bool = False
    first_dense: int = 0
    every: int = 1
    dense_d_ff: int = 0

    def dense(self, d_ff: int) -> feedforward.Dense:
        """A dense feed-forward of the experts' kind, for shared experts and blocks."""
        names = {field.name for field in dataclasses.fields(feedforward.Dense)}
        alike = {n: getattr(self.experts, n) for n in names if hasattr(self.experts, n)}
        return feedforward.Dense(**alike | {"d_ff": d_ff})

    def problems(self, path, root):
        for name, least in (
            ("num_experts", 1),
            ("shared_d_ff", 0),
            ("first_dense", 0),
            ("every", 1),
        ):
            if getattr(self, name) < least:
                yield f"{path}.{name}={getattr(self, name)}: must be at least {least}"
        if self.num_experts >= 1:
            where = f"{path}.selector"
            yield from self.selector.size_problems(where, self.num_experts)
        yield from capabilities.problems(self, path)
        yield from self._group_problems(path, root.mesh)
        if self.shared_gate and not self.shared_d_ff:
            yield (
                f"{path}.shared_gate=True would be ignored: there are no shared "
                "experts; set shared_d_ff"
            )
        routed = self.selector.num_routed(self.num_experts)
        yield from self.balance.layer_problems(path, routed, self.selector)
        if self.shared_d_ff:
            where = f"{path}.shared_d_ff"
            yield from feedforward.tensor_problems(self.shared_d_ff, where, root)
        has_dense = self.first_dense > 0 or self.every > 1
        if has_dense and self.dense_d_ff < 1:
            yield (
                f"{path}.dense_d_ff={self.dense_d_ff}: the dense blocks (first_dense="
                f"{self.first_dense}, every={self.every}) need a width"
            )
        if not has_dense and self.dense_d_ff:
            yield (
                f"{path}.dense_d_ff={self.dense_d_ff} would be ignored: no block is "
                "dense; set it to 0, or first_dense or every"
            )
        if self.dense_d_ff:
            where = f"{path}.dense_d_ff"
            yield from feedforward.tensor_problems(self.dense_d_ff, where, root)

    def _group_problems(self, path, sizes):
        axes, where = self.expert_axes, f"{path}.expert_axes={self.expert_axes}"
        if "expert" not in axes or len(set(axes)) < len(axes) or set(axes) - {*AXES}:
            yield f"{where}: must hold 'expert', and others of {AXES} at most once"
            return
        if "data" in axes and sizes.data < 1:
            yield f"{where}: set config.mesh.data to a number, {sizes.data} is not one"
            return
        shards = math.prod(getattr(sizes, axis) for axis in axes)
        if shards > 0 and self.num_experts % shards:
            what = " * ".join(f"config.mesh.{axis}" for axis in axes)
            shown = f"; {axes[0]} takes one of {config.divisors(self.num_experts)}"
            yield (
                f"{path}.num_experts={self.num_experts} is not divisible by "
                f"{what}={shards}{shown if len(axes) == 1 else ''}"
            )


class MoELayer(nnx.Module):
    """A feed-forward made of experts.

    Args:
      d_model: D.
      options: the config.
      std: deviation of the experts' initial weights, or a `module.Draw`.
      out_std: of their output projection.
      dtype: of the experts' weights.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        options: MoE,
        *,
        rngs: nnx.Rngs,
        std: float | module.Draw = 0.02,
        out_std: float | module.Draw = 0.02,
        dtype: str = "float32",
    ):
        self.options = options
        selector, num_experts = options.selector, options.num_experts
        num_scores = selector.num_routed(num_experts)
        num_scores *= getattr(selector, "slots_per_expert", 1)
        scorer = SCORERS[type(options.scorer)]
        self.scorer = scorer(d_model, num_scores, options.scorer, rngs)
        if options.noise is not None:
            noise = NOISES[type(options.noise)]
            self.noise = noise(d_model, num_scores, options.noise, rngs)
        if type(selector) in WEIGHTS:
            own = WEIGHTS[type(selector)]
            self.selector = own(d_model, num_experts, selector, rngs)
        if options.output_scale:
            self.output_scale = module.param(
                rngs, (d_model,), (None,), value=1.0, dtype=dtype
            )
        experts = EXPERTS[type(options.experts)]
        self.experts = experts(
            d_model,
            options.num_experts,
            options.experts,
            std=std,
            out_std=out_std,
            dtype=dtype,
            rngs=rngs,
        )
        module.rename_axes(
            self.experts, lambda axis: rules.grouped(axis, options.expert_axes)
        )
        if options.shared_d_ff:
            shared = options.dense(options.shared_d_ff)
            self.shared = feedforward.FeedForward(
                d_model, shared, std=std, out_std=out_std, dtype=dtype, rngs=rngs
            )
        if options.shared_gate:
            self.shared_gate = module.param(
                rngs, (d_model, 1), ("embed", None), std=std, dtype=dtype
            )

    def init_router_state(self) -> dict[str, Array]:
        """What this layer learns without gradients."""
        return router.init_state(self.options)

    def __call__(
        self,
        x: Array,
        *,
        router_state: Mapping[str, Array] | None = None,
        valid: Array | None = None,
        token_ids: Array | None = None,
        positions: Array | None = None,
        segments: Array | None = None,
        condition=None,
        carry=None,
        key: Array | None = None,
        mode: Mode = TRAIN,
        override: Override | None = None,
    ) -> tuple[Array, object, MoEAux]:
        """Routes every token through its experts.

        Args:
          x: (B, S, D).
          router_state: as `init_router_state` gives it (default: exactly that).
          valid: (B, S) bool, default all; padding gets zeros and is not counted.
          token_ids: (B, S) int32, for scorers and selectors that look at them.
          positions: (B, S) int32.
          segments: (B, S) int32.
          condition: pytree of (B, S, ...).
          carry: from the last router of the model; None for the first.
          key: for routers that draw; folded by the caller.
          mode: training or evaluation.
          override: what the caller imposes on the selector.

        Returns:
          (B, S, D), the carry for the next router, and `MoEAux`.
        """
        flat = lambda a: None if a is None else a.reshape(-1, *a.shape[2:])
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        tokens = Tokens(
            features=flat(x),
            valid=flat(valid),
            batch_shape=(x.shape[0], x.shape[1]),
            token_ids=flat(token_ids),
            positions=flat(positions),
            segments=flat(segments),
            condition=jax.tree.map(flat, condition),
        )
        state = self.init_router_state() if router_state is None else router_state
        with jax.named_scope("router"):
            if type(self.options.selector) in WEIGHTS:
                own = self.selector(tokens)
                tokens = dataclasses.replace(tokens, own=own)
            routing, carry = self._route(tokens, state, carry, key, mode, override)
        y, stats = self._dispatch(x, routing)
        if self.options.output_scale:
            y = y * self.output_scale[...].astype(y.dtype)
        if self.options.shared_d_ff:
            with jax.named_scope("shared"):
                y = y + jnp.where(valid[..., None], self._shared(x), 0)
        aux = self._aux(routing, stats, tokens, state, mode)
        return y, carry, aux

    def _aux(self, routing, stats, tokens, state, mode) -> MoEAux:
        options, selector = self.options.balance, self.options.selector
        seen = routing
        if isinstance(routing, Mixing):
            seen = mixing.as_routing(routing)
        balanced = among(seen, selector.num_routed(self.options.num_experts))
        losses = balance.losses(options, balanced, tokens.batch_shape, state)
        if type(selector) in LOSSES:
            losses |= LOSSES[type(selector)](selector, seen, tokens, self.scorer)
        return MoEAux(
            losses=losses,
            health=health.figures(seen),
            stats=stats,
            observation=router.observe(self.options, seen, balanced, tokens),
            statistics=balance.statistics(options, balanced),
            routing=routing if mode.capture else None,
        )

    def _route(self, tokens, state, carry, key, mode, override):
        options = self.options
        if carry is None:
            num_tokens = tokens.features.shape[0]
            carry = self.scorer.init_carry(options.scorer, num_tokens)
        noise = self.noise if options.noise is not None else None
        return route.route(
            self.scorer,
            noise,
            options.selector,
            tokens,
            state,
            carry,
            key,
            mode,
            override,
        )

    def _shared(self, x: Array) -> Array:
        y = self.shared(x)
        if not self.options.shared_gate:
            return y
        wide = module.accumulation_dtype(x.dtype)
        gate = jax.nn.sigmoid(x.astype(wide) @ self.shared_gate[...].astype(wide))
        return y * gate.astype(y.dtype)

    def _dispatch(
        self, x: Array, routing: Routing | Mixing
    ) -> tuple[Array, DispatchStats]:
        options = self.options
        if isinstance(routing, Mixing):
            return mixing.mix(self.experts, options.expert_axes, x, routing)
        return sharded.run(
            options.dispatch, self.experts, options.expert_axes, x, routing
        )
