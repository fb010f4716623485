"""Decoder-only language model: pre-norm blocks, dense or MoE, scanned by segment."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.models import multi_token
from moe_jax.models.base import Output, RouterState, TokenInputs
from moe_jax.models.block import Block, Outer
from moe_jax.models.decoder_config import Decoder, segments_of
from moe_jax.models.stacked import Stacked, is_vector
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import Mode, MoEAux, Observation, Override
from moe_jax.nn import attention, cross_entropy, module
from moe_jax.nn.attention.common import mean_seen
from moe_jax.nn.module import Params
from moe_jax.nn.remat import under
from moe_jax.parallel import rules


class DecoderModel(Stacked):
    """The decoder's code; see `models.base.Model` for the contract."""

    def __init__(self, options: Decoder):
        super().__init__(
            options,
            segments_of(options),
            lambda kind, rngs: Block(options, kind, rngs=rngs),
            lambda rngs: Outer(options, rngs=rngs),
        )
        self._ahead = None
        if options.mtp:
            self._ahead = module.Template(
                lambda rngs: multi_token.MultiToken(options, rngs=rngs)
            )
            for name in self._ahead_names():
                self.axes[name] = self._ahead.axes
                self.rounded[name] = self._ahead.rounded
                self.whole[name] = self._ahead.whole

    def _ahead_names(self):
        return [f"mtp_{k}" for k in range(self.options.mtp)]

    def init(self, key: jax.Array) -> Params:
        """See `Model.init`."""
        params, key = self._init(key)
        for name in self._ahead_names():
            key, ahead_key = jax.random.split(key)
            params[name] = self._ahead.init(ahead_key)
        return params

    def _moe_blocks(self):
        yield from super()._moe_blocks()
        if isinstance(self.options.feed_forward, MoE):
            yield from ((name, "block", 1) for name in self._ahead_names())

    def notes(self, rows: int, length: int) -> list[str]:
        """See `Model.notes`."""
        options = self.options
        shards = rules.size(jax.sharding.get_abstract_mesh(), "sequence")
        lines = [
            line
            for call in options.attention_calls(length, shards)
            for line in attention.auto.describe(options.attention, call)
        ]
        return lines + self._dispatch_notes(rows, length)

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
            for block, kind in seg.named_blocks():
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

    def _run(self, params, router_state, inputs, cache, start, key, mode, override):
        x = self._bound_outer(params).embed(inputs.tokens, self.options.dtype)
        x = rules.constrain(x, "batch", "sequence", None)

        def call(block, x, carry, layer):
            return block(
                x,
                inputs,
                layer.state,
                carry,
                layer.cache,
                start,
                layer.key,
                mode,
                layer.override,
            )

        given = dict(key=key, mode=mode, override=override, cache=cache)
        return self._run_blocks(call, params, router_state, x, **given)

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that take part in serving one token."""
        total, active = 0, 0.0
        for name, leaf in self._shapes().items():
            total += leaf.size
            if not name.startswith("mtp_"):
                active += leaf.size * self._share(name)
        return total, round(active)

    def flops_per_row(self, length: int) -> float:
        """See `RoutedModel.flops_per_row`."""
        return length * self.flops_per_token(length)

    def flops_per_token(self, sequence_length: int) -> float:
        """6 per active matrix weight, and attention to what is seen, both per token.

        Without a window a query sees half of a row on average.
        """
        options = self.options
        active = sum(
            leaf.size * self._share(name, sequence_length)
            for name, leaf in self._shapes().items()
            # A lookup costs nothing; a tied matrix is multiplied at the output.
            if (name != "embedding" or options.tie_embeddings) and not is_vector(name)
        )
        # Each depth multiplies with the output matrix again.
        active += options.mtp * options.vocab_size * options.d_model
        windows = options.windows() + options.windows()[-1:] * options.mtp
        seen = sum(mean_seen(sequence_length, window) for window in windows)
        widths = options.width_per_head + options.value_width
        return 6 * active + 6 * options.num_heads * widths * seen
