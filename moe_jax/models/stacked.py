"""What the model families share: scanned blocks, and their routers' state."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models import remat
from moe_jax.models.base import RouterState
from moe_jax.models.segments import Kind, Segment, interleave
from moe_jax.moe import balance
from moe_jax.moe import state as router
from moe_jax.moe.dispatch import auto
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import Mode, MoEAux, Override
from moe_jax.moe.scorers import SCORERS
from moe_jax.nn import module
from moe_jax.nn.module import Params
from moe_jax.nn.remat import scan_blocks
from moe_jax.tree import named_leaves, struct


@struct
class Layer:
    """What belongs to one block of a run, beside its weights.

    Attributes:
      state: of its router.
      cache: of its attention; or None.
      override: its part; or None.
      key: its own; or None.
    """

    state: Any
    cache: Any
    override: Override | None
    key: jax.Array | None


class Stacked:
    """A model of blocks in segments, with something outside of them.

    Args:
      options: with `dtype`, `remat` and `feed_forward`.
      segments: of its blocks.
      block: builds a block of a kind.
      outer: builds what stands outside; its weights' names are the model's own.
    """

    def __init__(
        self,
        options: Any,
        segments: tuple[Segment, ...],
        block: Callable[[Kind, nnx.Rngs], nnx.Module],
        outer: Callable[[nnx.Rngs], nnx.Module],
    ):
        self.options, self.segments = options, segments
        self.dtype = options.dtype
        self.num_moe_layers = sum(seg.num_moe * seg.repeats for seg in segments)
        self._block = {
            kind: module.Template(lambda rngs, k=kind: block(k, rngs))
            for kind in {kind for seg in segments for kind in seg.blocks}
        }
        self._outer = module.Template(outer)
        self.axes, self.rounded = dict(self._outer.axes), dict(self._outer.rounded)
        self.whole = dict(self._outer.whole)
        for name, seg in self._named_segments():
            blocks = {b: self._block[kind] for b, kind in seg.named_blocks()}
            each = lambda fact, of=blocks: {b: fact(t) for b, t in of.items()}
            self.axes[name] = each(lambda t: module.stacked_axes(t.axes))
            self.rounded[name] = each(lambda t: t.rounded)
            self.whole[name] = each(lambda t: t.whole)

    def _named_segments(self) -> list[tuple[str, Segment]]:
        return [(f"segment_{i}", seg) for i, seg in enumerate(self.segments)]

    def _bound_outer(self, params: Params) -> nnx.Module:
        return self._outer.bind({name: params[name] for name in self._outer.axes})

    def _dispatch_notes(self, rows: int, length: int) -> list[str]:
        """What `Auto` takes for rows of so many tokens."""
        ff = self.options.feed_forward
        if not isinstance(getattr(ff, "dispatch", None), auto.Auto):
            return []
        top_k = ff.selector.experts_per_token(ff.num_experts, length)
        return [auto.describe(ff.expert_axes, rows * length, top_k, ff.num_experts)]

    def init(self, key: jax.Array) -> Params:
        """See `Model.init`."""
        return self._init(key)[0]

    def _init(self, key: jax.Array) -> tuple[Params, jax.Array]:
        """Fresh parameters, and a key that nothing was drawn from."""
        outer_key, key = jax.random.split(key)
        params = dict(self._outer.init(outer_key))
        for name, seg in self._named_segments():
            params[name] = {}
            for block, kind in seg.named_blocks():
                key, block_key = jax.random.split(key)
                template = self._block[kind]
                params[name][block] = template.init_stacked(block_key, seg.repeats)
        return params, key

    def _moe_blocks(self) -> Iterator[tuple[str, str, int]]:
        """(segment or module, block, how often) of all MoE blocks."""
        for name, seg in self._named_segments():
            for block, kind in seg.named_blocks():
                if kind.moe:
                    yield name, block, seg.repeats

    def init_router_state(self) -> RouterState:
        """See `Model.init_router_state`."""
        state: RouterState = {}
        for name, block, repeats in self._moe_blocks():
            ff = self.options.feed_forward
            one = router.init_state(ff)
            stack = lambda a, n=repeats: jnp.broadcast_to(a, (n, *a.shape))
            state.setdefault(name, {})[block] = jax.tree.map(stack, one)
        return state

    def update_router_state(
        self, state: RouterState, observations: dict[str, Any]
    ) -> RouterState:
        """See `Model.update_router_state`."""
        return self._with(router.update, state, observations)

    def with_step_load(
        self, state: RouterState, observations: dict[str, Any]
    ) -> RouterState:
        """See `Model.with_step_load`."""
        return self._with(router.with_step_load, state, observations)

    def _with(self, change, state, observations) -> RouterState:
        new: RouterState = {}
        for name, block, _ in self._moe_blocks():
            new.setdefault(name, {})[block] = change(
                self.options.feed_forward,
                state[name][block],
                observations[name][block],
            )
        return new

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """See `Model.expert_axes`."""
        return getattr(self.options.feed_forward, "expert_axes", ())

    @property
    def needs_step_load(self) -> bool:
        """See `Model.needs_step_load`."""
        ff = self.options.feed_forward
        return isinstance(ff, MoE) and ff.balance.global_weight > 0

    def _joined(self, auxes: list[MoEAux]) -> MoEAux | None:
        if not auxes:
            return None
        aux = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
        return balance.pooled(self.options.feed_forward.balance, aux)

    def _run_blocks(
        self,
        call: Callable[..., tuple[Any, Any, Any, MoEAux | None]],
        params: Params,
        router_state: RouterState,
        x: jax.Array,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None,
        cache: dict[str, Any] | None = None,
    ):
        """Runs all blocks.

        Args:
          call: `(block, x, carry, layer) -> x, carry, cache, aux` with a `Layer`.
          params: of the model.
          router_state: of the model.
          x: (B, S, D).
          key: of the call; each block gets its own.
          mode: training or evaluation.
          override: stacked on the MoE layers.
          cache: of all segments; or None.

        Returns:
          (B, S, D), the new cache, observations, and MoEAux over the MoE layers.
        """
        carry, new_cache, observations, auxes = None, {}, {}, []
        for name, seg in self._named_segments():
            layers = dict(
                params=params[name],
                state=router_state.get(name, {}),
                cache=None if cache is None else cache[name],
                override=seg.part_of(override),
                repeat=jnp.arange(seg.repeats),
            )
            if carry is None and seg.num_moe:
                carry = self._first_carry(x)
            (x, carry), (new_cache[name], aux) = self._scan(
                call, seg, layers, (x, carry), key, mode
            )
            if aux:
                observations[name] = {b: a.observation for b, a in aux.items()}
                auxes.append(interleave(list(aux.values())))
        return x, new_cache, observations, self._joined(auxes)

    def _first_carry(self, x):
        options = self.options.feed_forward.scorer
        return SCORERS[type(options)].init_carry(options, x.shape[0] * x.shape[1])

    def _scan(self, call, seg, layers, start, key, mode):
        """Runs a segment; outputs are stacked over its repeats."""

        def body(state, layer):
            x, carry = state
            caches, auxes = {}, {}
            for i, (name, kind) in enumerate(seg.named_blocks()):
                index = seg.first_layer + layer["repeat"] * len(seg.blocks) + i
                block = self._block[kind].bind(layer["params"][name])
                own = Layer(
                    state=layer["state"].get(name),
                    cache=layer["cache"] and layer["cache"][name],
                    override=layer["override"] and layer["override"].get(name),
                    key=None if key is None else jax.random.fold_in(key, index),
                )
                x, carry, caches[name], aux = call(block, x, carry, own)
                if kind.moe:
                    auxes[name] = aux
            return (x, carry), (caches, auxes)

        policies = self._policies(mode)[: seg.repeats]
        return scan_blocks(body, policies, start, layers)

    def _policies(self, mode: Mode):
        return remat.policies(self.options.remat) if mode.train else (None,)

    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return named_leaves(jax.eval_shape(self.init, jax.random.key(0)))

    def _share(self, name: str, sequence_length: int = 0) -> float:
        """Share of a parameter that serves a token: K / E of the experts."""
        if "/experts/" not in name:
            return 1.0
        ff = self.options.feed_forward
        served = ff.selector.experts_per_token(ff.num_experts, sequence_length)
        return served / ff.num_experts


def is_vector(name: str) -> bool:
    """Whether a weight is a norm's, a bias or the like, and costs next to nothing."""
    last = name.rsplit("/", 1)[-1]
    return last in ("scale", "bias", "output_bias", "b") or last.startswith("b_")
