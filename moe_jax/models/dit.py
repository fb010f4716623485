"""Diffusion transformer: adaLN-zero blocks, dense or MoE, scanned by segment."""

import jax
import jax.numpy as jnp

from moe_jax.models.base import ImageInputs, ImageOutput, RouterState
from moe_jax.models.dit_block import Block, Outer
from moe_jax.models.dit_config import DiT, segments_of
from moe_jax.models.masks import LOSSES
from moe_jax.models.segments import interleave
from moe_jax.models.stacked import Stacked, is_vector
from moe_jax.moe.routing import Mode, Override
from moe_jax.nn import attention
from moe_jax.nn.attention.common import mean_seen
from moe_jax.nn.module import Params
from moe_jax.parallel import rules

# What an image meets once, and not each of its tokens.
_OF_IMAGES = ("modulation", "time", "vector", "log_variance")


class DiTModel(Stacked):
    """The diffusion transformer's code; see `models.base.ImageModel`."""

    def __init__(self, options: DiT):
        super().__init__(
            options,
            segments_of(options),
            lambda kind, rngs: Block(options, kind, rngs=rngs),
            lambda rngs: Outer(options, rngs=rngs),
        )

    def notes(self, rows: int, length: int) -> list[str]:
        """See `RoutedModel.notes`; a row is an image, whose `length` is its own."""
        options = self.options
        shards = rules.size(jax.sharding.get_abstract_mesh(), "sequence")
        call = options.attention_call(shards)
        lines = attention.auto.describe(options.attention, call)
        return lines + self._dispatch_notes(rows, options.num_tokens)

    def apply(
        self,
        params: Params,
        router_state: RouterState,
        inputs: ImageInputs,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None = None,
    ) -> ImageOutput:
        """See `ImageModel.apply`; arrays of `override` are stacked on the MoE layers.

        Raises:
          ValueError: inputs that do not fit the model; see `Outer.condition`.
        """
        outer, last = self._bound_outer(params), self.options.num_layers
        own = None if key is None else jax.random.fold_in(key, last)
        with jax.named_scope("condition"):
            condition = outer.condition(inputs, own, mode)
        with jax.named_scope("embedding"):
            x = outer.embed(inputs.x)

        def call(block, x, carry, layer):
            x, carry, aux = block(x, inputs, condition, carry, layer, mode)
            return x, carry, None, aux

        given = dict(key=key, mode=mode, override=override)
        x, _, observations, aux = self._run_blocks(
            call, params, router_state, x, **given
        )
        with jax.named_scope("output"):
            prediction = outer.predict(x, condition)
        own = None if key is None else jax.random.fold_in(key, last + 1)
        losses = self._mask_losses(params, outer, inputs, condition, own, mode)
        return ImageOutput(
            prediction=prediction,
            log_variance=outer.uncertainty(condition),
            losses=losses,
            observations=observations,
            aux=aux,
        )

    def _mask_losses(self, params, outer, inputs, condition, key, mode):
        """In training only; a loss does not see the blocks' input."""
        options = self.options
        loss = LOSSES.get(type(options.input_mask))
        if loss is None or not mode.train:
            return {}
        routers = self._mask_routers(params)
        told = condition, inputs.valid
        with jax.named_scope("mask_loss"):
            return loss(options.input_mask, outer.embed_times, routers, *told, key)

    def _mask_routers(self, params: Params) -> dict[str, jax.Array]:
        """The weights of all masks' routers, stacked on the blocks."""
        found = []
        for name, seg in self._named_segments():
            scorers = [
                self._block[kind].bind(params[name][block]).mask.scorer
                for block, kind in seg.named_blocks()
            ]
            found.append(interleave([dict(w=s.w[...], b=s.b[...]) for s in scorers]))
        return jax.tree.map(lambda *a: jnp.concatenate(a), *found)

    def _share(self, name: str, sequence_length: int = 0) -> float:
        """See `Stacked`."""
        if "/mask/" in name:
            return self.options.input_mask.share(name.rsplit("/mask/", 1)[1])
        return super()._share(name, sequence_length)

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that take part in serving one token.

        The published counts have the fixed positions too, N D more.
        """
        shapes = self._shapes().items()
        active = sum(leaf.size * self._share(name) for name, leaf in shapes)
        return sum(leaf.size for _, leaf in shapes), round(active)

    def _of_images(self, name: str) -> bool:
        """Whether a weight meets an image once, and not each of its tokens."""
        parts = name.split("/")
        if "scorer" in parts:
            return "mask" in parts or self.options.feed_forward.scorer.by_time
        return any(part in _OF_IMAGES for part in parts)

    def flops_per_row(self, length: int) -> float:
        """See `RoutedModel.flops_per_row`; of an image.

        6 per active matrix weight and token (or image), and attention to all.
        """
        options, tokens = self.options, self.options.num_tokens
        products = 0.0
        for name, leaf in self._shapes().items():
            if is_vector(name) or name in ("label/table", "vector/null"):
                continue
            once = leaf.size * self._share(name, tokens)
            if name.endswith("/mask/w"):
                # Its experts are mixed for an image, whose tokens meet the mixture.
                products += once + leaf.size / leaf.shape[-3] * tokens
            else:
                products += once * (1 if self._of_images(name) else tokens)
        seen = options.num_layers * mean_seen(tokens, causal=False)
        return 6 * products + 6 * 2 * options.d_model * seen * tokens
