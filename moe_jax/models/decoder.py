"""Decoder-only language model: pre-norm blocks, dense or MoE, scanned by segment."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.models import multi_token, remat
from moe_jax.models.base import Output, RouterState, TokenInputs
from moe_jax.models.block import Block, Outer
from moe_jax.models.decoder_config import Decoder, Kind, Segment, segments_of
from moe_jax.moe import balance
from moe_jax.moe.dispatch import auto
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import Mode, MoEAux, Observation, Override
from moe_jax.moe.scorers import SCORERS
from moe_jax.nn import attention, cross_entropy, module
from moe_jax.nn.attention.common import mean_seen
from moe_jax.nn.module import Params
from moe_jax.nn.remat import scan_blocks, under
from moe_jax.parallel import rules
from moe_jax.tree import named_leaves


class DecoderModel:
    """The decoder's code; see `models.base.Model` for the contract."""

    def __init__(self, options: Decoder):
        self.options = options
        self.dtype = options.dtype
        self.segments = segments_of(options)
        self.num_moe_layers = sum(seg.num_moe * seg.repeats for seg in self.segments)
        self._block = {
            kind: module.Template(lambda rngs, k=kind: Block(options, k, rngs=rngs))
            for kind in {kind for seg in self.segments for kind in seg.blocks}
        }
        self._outer = module.Template(lambda rngs: Outer(options, rngs=rngs))
        outer = self._outer
        self.axes, self.rounded = dict(outer.axes), dict(outer.rounded)
        self.whole = dict(outer.whole)
        for name, seg in self._named_segments():
            blocks = {b: self._block[kind] for b, kind in _named_blocks(seg)}
            each = lambda fact, of=blocks: {b: fact(t) for b, t in of.items()}
            self.axes[name] = each(lambda t: module.stacked_axes(t.axes))
            self.rounded[name] = each(lambda t: t.rounded)
            self.whole[name] = each(lambda t: t.whole)
        self._ahead = None
        if options.mtp:
            self._ahead = module.Template(
                lambda rngs: multi_token.MultiToken(options, rngs=rngs)
            )
            for name in self._ahead_names():
                self.axes[name] = self._ahead.axes
                self.rounded[name] = self._ahead.rounded
                self.whole[name] = self._ahead.whole

    def _named_segments(self):
        return [(f"segment_{i}", seg) for i, seg in enumerate(self.segments)]

    def _ahead_names(self):
        return [f"mtp_{k}" for k in range(self.options.mtp)]

    def init(self, key: jax.Array) -> Params:
        outer_key, key = jax.random.split(key)
        params = dict(self._outer.init(outer_key))
        for name, seg in self._named_segments():
            params[name] = {}
            for block, kind in _named_blocks(seg):
                key, block_key = jax.random.split(key)
                template = self._block[kind]
                params[name][block] = template.init_stacked(block_key, seg.repeats)
        for name in self._ahead_names():
            key, ahead_key = jax.random.split(key)
            params[name] = self._ahead.init(ahead_key)
        return params

    def _moe_blocks(self):
        """(segment or module, block, how often) of all MoE blocks."""
        for name, seg in self._named_segments():
            for block, kind in _named_blocks(seg):
                if kind.moe:
                    yield name, block, seg.repeats
        if isinstance(self.options.feed_forward, MoE):
            yield from ((name, "block", 1) for name in self._ahead_names())

    def init_router_state(self) -> RouterState:
        state: RouterState = {}
        for name, block, repeats in self._moe_blocks():
            ff = self.options.feed_forward
            one = balance.init_state(ff.balance, ff.num_experts)
            stack = lambda a, n=repeats: jnp.broadcast_to(a, (n, *a.shape))
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
            for block, kind in _named_blocks(seg):
                layer = self._block[kind].hollow.attention
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
        outer = self._bound_outer(params)
        with jax.named_scope("logits"):
            return outer.output_of(outer.norm(hidden))

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, V), float32 or wider."""
        found = self.output(params, hidden)
        with jax.named_scope("logits"):
            return cross_entropy.logits(*found)

    def _bound_outer(self, params: Params) -> Outer:
        return self._outer.bind({name: params[name] for name in self._outer.axes})

    @property
    def depths_ahead(self) -> int:
        """See `Model.depths_ahead`."""
        return self.options.mtp

    def ahead(
        self,
        params: Params,
        router_state: RouterState,
        inputs: TokenInputs,
        normed: jax.Array,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None = None,
    ) -> tuple[list[jax.Array], dict[str, Observation], MoEAux | None]:
        """See `Model.ahead`."""
        outer, found, observations, auxes = self._bound_outer(params), [], {}, []

        def run(params, normed, tokens, of_block):
            embedded = outer.embed(tokens.tokens, self.options.dtype)
            module = self._ahead.bind(params)
            return module(normed, embedded, tokens, carry=None, mode=mode, **of_block)

        for k, name in enumerate(self._ahead_names()):
            pick = lambda tree, i: tree and jax.tree.map(lambda a: a[i], tree)
            fold = self.options.num_layers + k
            of_block = dict(
                state=pick(router_state.get(name, {}).get("block"), 0),
                key=None if key is None else jax.random.fold_in(key, fold),
                override=pick(override, self.num_moe_layers + k),
            )
            policy = self._policies(mode)[k % len(self._policies(mode))]
            normed, aux = under(policy, run)(
                params[name], normed, multi_token.ahead(inputs, k + 1), of_block
            )
            found.append(normed)
            if aux is not None:
                aux = jax.tree.map(lambda a: a[None], aux)
                observations[name] = {"block": aux.observation}
                auxes.append(aux)
        return found, observations, self._joined(auxes)

    def _joined(self, auxes: list[MoEAux]) -> MoEAux | None:
        if not auxes:
            return None
        aux = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
        return balance.pooled(self.options.feed_forward.balance, aux)

    def _run(self, params, router_state, inputs, cache, start, key, mode, override):
        outer = self._bound_outer(params)
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
            if carry is None and seg.num_moe:
                carry = self._first_carry(x)
            (x, carry), (new_cache[name], aux) = self._scan(
                seg, layers, x, carry, inputs, start, key, mode
            )
            if aux:
                observations[name] = {b: a.observation for b, a in aux.items()}
                auxes.append(_interleave(list(aux.values())))
        return x, new_cache, observations, self._joined(auxes)

    def _first_carry(self, x):
        options = self.options.feed_forward.scorer
        return SCORERS[type(options)].init_carry(options, x.shape[0] * x.shape[1])

    def _scan(self, seg, layers, x, carry, inputs, start, key, mode):
        """Runs a segment; outputs are stacked over its repeats."""

        def body(state, layer):
            x, carry = state
            caches, auxes = {}, {}
            for i, (name, kind) in enumerate(_named_blocks(seg)):
                index = seg.first_layer + layer["repeat"] * len(seg.blocks) + i
                block = self._block[kind].bind(layer["params"][name])
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
                if kind.moe:
                    auxes[name] = aux
            return (x, carry), (caches, auxes)

        policies = self._policies(mode)[: seg.repeats]
        return scan_blocks(body, policies, (x, carry), layers)

    def _policies(self, mode: Mode):
        return remat.policies(self.options.remat) if mode.train else (None,)

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that take part in serving one token."""
        total, active = 0, 0.0
        for name, leaf in self._shapes().items():
            total += leaf.size
            if not name.startswith("mtp_"):
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
            if (name != "embedding" or options.tie_embeddings) and not _is_vector(name)
        )
        # Each depth multiplies with the output matrix again.
        active += options.mtp * options.vocab_size * options.d_model
        windows = options.windows() + options.windows()[-1:] * options.mtp
        seen = sum(mean_seen(sequence_length, window) for window in windows)
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


def _is_vector(name: str) -> bool:
    """Whether a weight is a norm's, a bias or the like, and costs next to nothing."""
    last = name.rsplit("/", 1)[-1]
    return last in ("scale", "bias", "output_bias", "b") or last.startswith("b_")


def _named_blocks(seg: Segment) -> list[tuple[str, Kind]]:
    return [(f"block_{i}", kind) for i, kind in enumerate(seg.blocks)]


def _interleave(auxes: list[MoEAux]) -> MoEAux:
    """Aux of a pattern's MoE blocks, each (R, ...), in layer order (R * n, ...)."""

    def join(*leaves):
        joined = jnp.stack(leaves, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *auxes)


def _slice_override(override: Override | None, seg: Segment):
    """The part of an override stacked on MoE layers that a segment's scan takes."""
    if override is None or not seg.num_moe:
        return None
    per_repeat = seg.num_moe
    names = [name for name, kind in _named_blocks(seg) if kind.moe]

    def part(i):
        first = seg.first_moe + i
        last = seg.first_moe + seg.repeats * per_repeat
        return jax.tree.map(lambda a: a[first:last:per_repeat], override)

    return {name: part(i) for i, name in enumerate(names)}
