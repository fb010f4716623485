"""Decoder-only language model: pre-norm blocks, dense or MoE, scanned by segment."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.base import Output, RouterState, TokenInputs
from moe_jax.models.decoder_attention import attention_of
from moe_jax.models.decoder_config import (
    Decoder,
    Segment,
    remat_policy,
    segments_of,
)
from moe_jax.moe import balance
from moe_jax.moe.dispatch import auto
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.routing import Mode, MoEAux, Observation, Override
from moe_jax.moe.scorers import SCORERS
from moe_jax.nn import attention, cross_entropy, embedding, feedforward, module, norms
from moe_jax.nn.attention.common import mean_seen
from moe_jax.nn.module import Params
from moe_jax.parallel import rules
from moe_jax.tree import named_leaves


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, options: Decoder, is_moe: bool, *, rngs: nnx.Rngs):
        out_std = options.init_std / math.sqrt(2 * options.num_layers)
        shared = dict(std=options.init_std, out_std=out_std, dtype=options.param_dtype)
        norm = dict(eps=options.norm_eps, dtype=options.param_dtype, rngs=rngs)
        self.is_moe = is_moe
        self.attention_norm = norms.RMSNorm(options.d_model, **norm)
        self.attention = attention_of(options, options.window, rngs=rngs, **shared)
        self.feed_forward_norm = norms.RMSNorm(options.d_model, **norm)
        ff = options.feed_forward
        if is_moe:
            self.moe = MoELayer(options.d_model, ff, rngs=rngs, **shared)
        else:
            if isinstance(ff, MoE):
                ff = ff.dense(ff.dense_d_ff)
            self.feed_forward = feedforward.FeedForward(
                options.d_model, ff, rngs=rngs, **shared
            )

    def __call__(
        self, x, inputs: TokenInputs, state, carry, cache, start, key, mode, override
    ):
        """(B, S, D) in and out; also the router's carry, the cache and MoEAux."""
        with jax.named_scope("attention"):
            attended, cache = self.attention(
                self.attention_norm(x), inputs.positions, inputs.segments, cache, start
            )
        x = rules.constrain(x + attended, "batch", "sequence", None)
        normed, aux = self.feed_forward_norm(x), None
        if self.is_moe:
            y, carry, aux = self.moe(
                normed,
                router_state=state,
                valid=inputs.segments > 0,
                token_ids=inputs.tokens,
                positions=inputs.positions,
                segments=inputs.segments,
                carry=carry,
                key=key,
                mode=mode,
                override=override,
            )
        else:
            with jax.named_scope("feed_forward"):
                y = self.feed_forward(normed)
        return rules.constrain(x + y, "batch", "sequence", None), carry, cache, aux


class DecoderModel:
    """The decoder's code; see `models.base.Model` for the contract."""

    def __init__(self, options: Decoder):
        self.options = options
        self.dtype = options.dtype
        self.segments = segments_of(options)
        self.num_moe_layers = sum(sum(s.moe) * s.repeats for s in self.segments)
        self._block = {
            is_moe: module.Template(lambda rngs, m=is_moe: Block(options, m, rngs=rngs))
            for is_moe in {m for s in self.segments for m in s.moe}
        }
        self._outer = module.Template(lambda rngs: Outer(options, rngs=rngs))
        self.axes = dict(self._outer.axes)
        self.rounded = dict(self._outer.rounded)
        for name, seg in self._named_segments():
            blocks = {b: self._block[is_moe] for b, is_moe in _named_blocks(seg)}
            self.axes[name] = {
                b: module.stacked_axes(block.axes) for b, block in blocks.items()
            }
            self.rounded[name] = {b: block.rounded for b, block in blocks.items()}

    def _named_segments(self):
        return [(f"segment_{i}", seg) for i, seg in enumerate(self.segments)]

    def init(self, key: jax.Array) -> Params:
        outer_key, key = jax.random.split(key)
        params = dict(self._outer.init(outer_key))
        for name, seg in self._named_segments():
            params[name] = {}
            for block, is_moe in _named_blocks(seg):
                key, block_key = jax.random.split(key)
                template = self._block[is_moe]
                params[name][block] = template.init_stacked(block_key, seg.repeats)
        return params

    def _moe_blocks(self):
        for name, seg in self._named_segments():
            for block, is_moe in _named_blocks(seg):
                if is_moe:
                    yield name, block, seg

    def init_router_state(self) -> RouterState:
        state: RouterState = {}
        for name, block, seg in self._moe_blocks():
            ff = self.options.feed_forward
            one = balance.init_state(ff.balance, ff.num_experts)
            stack = lambda a, n=seg.repeats: jnp.broadcast_to(a, (n, *a.shape))
            state.setdefault(name, {})[block] = jax.tree.map(stack, one)
        return state

    def update_router_state(
        self, state: RouterState, observations: dict[str, Any]
    ) -> RouterState:
        new: RouterState = {}
        for name, block, _ in self._moe_blocks():
            new.setdefault(name, {})[block] = balance.update(
                self.options.feed_forward.balance,
                state[name][block],
                observations[name][block],
            )
        return new

    def notes(self, rows: int, length: int) -> list[str]:
        """See `Model.notes`."""
        options, ff = self.options, self.options.feed_forward
        shards = rules.size(jax.sharding.get_abstract_mesh(), "sequence")
        lines = [
            line
            for call in options.attention_calls(length, shards)
            for line in attention.auto.describe(options.attention, call)
        ]
        if isinstance(getattr(ff, "dispatch", None), auto.Auto):
            top_k = ff.selector.experts_per_token(ff.num_experts, length)
            shapes = rows * length, top_k, ff.num_experts
            lines.append(auto.describe(ff.expert_axes, *shapes))
        return lines

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """See `Model.expert_axes`."""
        return getattr(self.options.feed_forward, "expert_axes", ())

    @property
    def needs_step_load(self) -> bool:
        """See `Model.needs_step_load`."""
        ff = self.options.feed_forward
        return isinstance(ff, MoE) and ff.balance.global_weight > 0

    def with_step_load(
        self, state: RouterState, observations: dict[str, Any]
    ) -> RouterState:
        new: RouterState = {}
        for name, block, _ in self._moe_blocks():
            new.setdefault(name, {})[block] = balance.with_step_load(
                self.options.feed_forward.balance,
                state[name][block],
                observations[name][block],
            )
        return new

    def apply(
        self,
        params: Params,
        router_state: RouterState,
        inputs: TokenInputs,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None = None,
    ) -> tuple[jax.Array, dict[str, Observation], MoEAux | None]:
        """See `Model.apply`; arrays of `override` are stacked on the MoE layers."""
        hidden, _, observations, aux = self._run(
            params, router_state, inputs, None, 0, key, mode, override
        )
        return hidden, observations, aux

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        """An empty KV cache for `batch` texts of at most `length` tokens."""
        cache: dict[str, Any] = {}
        for name, seg in self._named_segments():
            cache[name] = {}
            for block, is_moe in _named_blocks(seg):
                layer = self._block[is_moe].hollow.attention
                one = layer.init_cache(batch, length, self.options.dtype)
                # An array of its own each: the caller may donate them.
                stack = lambda a, n=seg.repeats: jnp.zeros((n, *a.shape), a.dtype)
                cache[name][block] = jax.tree.map(stack, one)
        return cache

    def decode(
        self,
        params: Params,
        router_state: RouterState,
        inputs: TokenInputs,
        cache: dict[str, Any],
        start: jax.Array,
        *,
        mode: Mode,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Hidden states of new tokens after those in the cache, and the new cache."""
        hidden, cache, _, _ = self._run(
            params, router_state, inputs, cache, start, None, mode, None
        )
        return hidden, cache

    def output(self, params: Params, hidden: jax.Array) -> Output:
        """See `Model.output`."""
        outer = self._outer.bind({name: params[name] for name in self._outer.axes})
        with jax.named_scope("logits"):
            return outer.output_of(hidden)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, V), float32 or wider."""
        found = self.output(params, hidden)
        with jax.named_scope("logits"):
            return cross_entropy.logits(found.hidden, found.matrix, found.axes)

    def _run(self, params, router_state, inputs, cache, start, key, mode, override):
        outer = self._outer.bind({name: params[name] for name in self._outer.axes})
        x = outer.embed(inputs.tokens, self.options.dtype)
        x = rules.constrain(x, "batch", "sequence", None)
        carry, new_cache, observations, auxes = None, {}, {}, []
        for name, seg in self._named_segments():
            layers = dict(
                params=params[name],
                state=router_state.get(name, {}),
                cache=None if cache is None else cache[name],
                override=_slice_override(override, seg),
                repeat=jnp.arange(seg.repeats),
            )
            if carry is None and any(seg.moe):
                carry = self._first_carry(x)
            (x, carry), (new_cache[name], aux) = self._scan(
                seg, layers, x, carry, inputs, start, key, mode
            )
            if aux:
                observations[name] = {b: a.observation for b, a in aux.items()}
                auxes.append(_interleave(list(aux.values())))
        aux = None
        if auxes:
            aux = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
            aux = balance.pooled(self.options.feed_forward.balance, aux)
        return x, new_cache, observations, aux

    def _first_carry(self, x):
        options = self.options.feed_forward.scorer
        return SCORERS[type(options)].init_carry(options, x.shape[0] * x.shape[1])

    def _scan(self, seg, layers, x, carry, inputs, start, key, mode):
        """Runs a segment; outputs are stacked over its repeats."""

        def body(state, layer):
            x, carry = state
            caches, auxes = {}, {}
            for i, (name, is_moe) in enumerate(_named_blocks(seg)):
                index = seg.first_layer + layer["repeat"] * len(seg.moe) + i
                block = self._block[is_moe].bind(layer["params"][name])
                x, carry, caches[name], aux = block(
                    x,
                    inputs,
                    layer["state"].get(name),
                    carry,
                    layer["cache"] and layer["cache"][name],
                    start,
                    None if key is None else jax.random.fold_in(key, index),
                    mode,
                    layer["override"] and layer["override"].get(name),
                )
                if is_moe:
                    auxes[name] = aux
            return (x, carry), (caches, auxes)

        policy = remat_policy(self.options.remat)
        if mode.train and policy is not None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, (x, carry), layers)

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that take part in serving one token."""
        total, active = 0, 0.0
        for name, leaf in self._shapes().items():
            total += leaf.size
            active += leaf.size * self._share(name)
        return total, round(active)

    def flops_per_token(self, sequence_length: int) -> float:
        """6 per active matrix weight, and attention to what is seen, both per token.

        Without a window a query sees half of a row on average.
        """
        options = self.options
        active = sum(
            leaf.size * self._share(name, sequence_length)
            for name, leaf in self._shapes().items()
            # A lookup costs nothing; a tied matrix is multiplied at the output.
            if (name != "embedding" or options.tie_embeddings)
            and not name.endswith("/scale")
        )
        seen = sum(mean_seen(sequence_length, window) for window in options.windows())
        widths = options.width_per_head + options.value_width
        return 6 * active + 6 * options.num_heads * widths * seen

    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return named_leaves(jax.eval_shape(self.init, jax.random.key(0)))

    def _share(self, name: str, sequence_length: int = 0) -> float:
        """Share of a parameter that serves a token: K / E of the experts."""
        if "/experts/" not in name:
            return 1.0
        ff = self.options.feed_forward
        served = ff.selector.experts_per_token(ff.num_experts, sequence_length)
        return served / ff.num_experts


class Outer(nnx.Module):
    """What stands outside the blocks: embedding, last norm, output matrix."""

    def __init__(self, options: Decoder, *, rngs: nnx.Rngs):
        vocab, d_model = options.vocab_size, options.d_model
        dtype = options.param_dtype
        self.embedding = module.param(
            rngs,
            (vocab, d_model),
            ("vocab", "embed"),
            std=options.init_std,
            dtype=dtype,
        )
        self.norm = norms.RMSNorm(d_model, eps=options.norm_eps, dtype=dtype, rngs=rngs)
        self.tied = options.tie_embeddings
        if not options.tie_embeddings:
            self.output = module.param(
                rngs,
                (d_model, vocab),
                ("embed", "vocab"),
                std=options.init_std,
                dtype=dtype,
            )

    def embed(self, tokens: jax.Array, dtype: str) -> jax.Array:
        with jax.named_scope("embedding"):
            return embedding.lookup(self.embedding[...], tokens, dtype)

    def output_of(self, hidden: jax.Array) -> Output:
        matrix = self.embedding if self.tied else self.output
        return Output(self.norm(hidden), matrix[...], matrix.axes)


def _named_blocks(seg: Segment) -> list[tuple[str, bool]]:
    return [(f"block_{i}", is_moe) for i, is_moe in enumerate(seg.moe)]


def _interleave(auxes: list[MoEAux]) -> MoEAux:
    """Aux of a pattern's MoE blocks, each (R, ...), in layer order (R * n, ...)."""

    def join(*leaves):
        joined = jnp.stack(leaves, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *auxes)


def _slice_override(override: Override | None, seg: Segment):
    """The part of an override stacked on MoE layers that a segment's scan takes."""
    if override is None or not any(seg.moe):
        return None
    per_repeat = sum(seg.moe)
    names = [name for name, is_moe in _named_blocks(seg) if is_moe]

    def part(i):
        first = seg.first_moe + i
        last = seg.first_moe + seg.repeats * per_repeat
        return jax.tree.map(lambda a: a[first:last:per_repeat], override)

    return {name: part(i) for i, name in enumerate(names)}
