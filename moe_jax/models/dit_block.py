"""What a diffusion transformer is made of: its blocks, and what stands outside."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models.base import ImageInputs
from moe_jax.models.dit_config import DiT, mlp
from moe_jax.models.remat import INPUT
from moe_jax.models.segments import Kind
from moe_jax.models.stacked import Layer
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.routing import Condition, Mode
from moe_jax.nn import conditioning, feedforward, images, linear, module, norms
from moe_jax.nn.attention.layer import Attention
from moe_jax.parallel import rules

_TEXT = ("batch", "sequence", None)


class Block(nnx.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition.

    `x + gate * f(norm(x) (1 + scale) + shift)`, "adaLN-Zero": gates begin at zero.
    """

    def __init__(self, options: DiT, kind: Kind, *, rngs: nnx.Rngs):
        d_model, dtype = options.d_model, options.param_dtype
        self.eps, self.is_moe = options.norm_eps, kind.moe
        self.modulation = conditioning.Modulation(d_model, 6, dtype=dtype, rngs=rngs)
        # The published code holds queries, keys and values in one matrix (D, 3 D).
        self.attention = Attention(
            d_model,
            options.num_heads,
            options.num_heads,
            options.width_per_head,
            options.attention,
            rope=None,
            causal=False,
            qk_norm=options.qk_norm,
            norm_eps=options.norm_eps,
            bias=True,
            output_bias=True,
            std=module.uniform(math.sqrt(6 / (4 * d_model))),
            out_std=module.uniform(math.sqrt(6 / (2 * d_model))),
            dtype=dtype,
            rngs=rngs,
        )
        ff = options.feed_forward
        drawn = dict(std=module.xavier, out_std=module.xavier, dtype=dtype, rngs=rngs)
        if kind.moe:
            self.moe = MoELayer(d_model, ff, **drawn)
        else:
            ff = mlp(ff.dense_d_ff) if isinstance(ff, MoE) else ff
            self.feed_forward = feedforward.FeedForward(d_model, ff, **drawn)

    def __call__(
        self, x: jax.Array, inputs: ImageInputs, condition: Condition, carry,
        layer: Layer, mode: Mode,
    ):  # fmt: skip
        """(B, S, D) in and out; also the router's carry and MoEAux.

        `condition` has a row an image.
        """
        x = checkpoint_name(x, INPUT)
        told = self.modulation(condition.embedding)
        shift, scale, gate, *of_feed_forward = told
        segments = jnp.ones(x.shape[:2], jnp.int32)
        with jax.named_scope("attention"):
            attended, _ = self.attention(self._normed(x, shift, scale), None, segments)
        x = rules.constrain(x + gate * attended, *_TEXT)
        shift, scale, gate = of_feed_forward
        normed, aux = self._normed(x, shift, scale), None
        if self.is_moe:
            y, carry, aux = self._routed(normed, inputs, condition, carry, layer, mode)
        else:
            with jax.named_scope("feed_forward"):
                y = self.feed_forward(normed)
        return rules.constrain(x + gate * y, *_TEXT), carry, aux

    def _normed(self, x, shift, scale):
        normed = norms.standardized(x, self.eps).astype(x.dtype)
        return conditioning.modulate(normed, shift, scale)

    def _routed(self, x, inputs, condition, carry, layer, mode):
        batch, length = x.shape[:2]

        def of_tokens(a):
            a = jnp.broadcast_to(a[:, None], (batch, length, *a.shape[1:]))
            return rules.constrain(a, "batch", "sequence", *[None] * (a.ndim - 2))

        places = jnp.arange(length, dtype=jnp.int32)
        return self.moe(
            x,
            router_state=layer.state,
            valid=None if inputs.valid is None else of_tokens(inputs.valid),
            positions=jnp.broadcast_to(places, (batch, length)),
            segments=jnp.ones((batch, length), jnp.int32),
            condition=jax.tree.map(of_tokens, condition),
            carry=carry,
            key=layer.key,
            mode=mode,
            override=layer.override,
        )


class Outer(nnx.Module):
    """What stands outside the blocks: patches, the condition, the last layer."""

    def __init__(self, options: DiT, *, rngs: nnx.Rngs):
        self.options = options
        d_model, dtype = options.d_model, options.param_dtype
        shared = dict(dtype=dtype, rngs=rngs)
        area = options.patch_size**2
        self.patches = linear.Affine(
            area * options.in_channels,
            (d_model,),
            (None, "embed"),
            std=module.xavier,
            **shared,
        )
        self.time = conditioning.TimestepEmbedding(d_model, **shared)
        of_condition = dict(null=options.condition_dropout > 0, **shared)
        if options.num_classes:
            self.label = conditioning.LabelEmbedding(
                options.num_classes, d_model, **of_condition
            )
        elif options.condition_width:
            self.vector = conditioning.VectorEmbedding(
                options.condition_width, d_model, **of_condition
            )
        if options.log_variance:
            self.log_variance = linear.Affine(
                d_model, (1,), ("embed", None), std=None, **shared
            )
        self.modulation = conditioning.Modulation(d_model, 2, **shared)
        out = area * options.out_channels
        self.output = linear.Affine(
            d_model, (out,), ("embed", None), std=None, **shared
        )

    def embed(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, S, D), with positions added."""
        options = self.options
        side = options.image_size // options.patch_size
        places = images.positions_2d(side, side, options.d_model)
        tokens = images.patchify(x, options.patch_size).astype(options.dtype)
        tokens = rules.constrain(tokens, *_TEXT)
        tokens = self.patches(tokens, _TEXT)
        return rules.constrain(tokens + jnp.asarray(places, tokens.dtype), *_TEXT)

    def condition(
        self, inputs: ImageInputs, key: jax.Array | None, mode: Mode
    ) -> Condition:
        """What blocks and routers are told, a row an image.

        Raises:
          ValueError: a condition that the model does not have, or has and did not get;
            images without condition for a model that knows none such; training that
            perturbs conditions without a key.
        """
        options = self.options
        _check(options, inputs)
        if not mode.train:
            key = None
        elif options.perturbation.strength and key is None:
            raise ValueError(f"{options.perturbation} draws in training: pass a key")
        none, dtype = inputs.none, options.dtype
        perturb = functools.partial(conditioning.perturbed, options.perturbation, key)
        time = self.time(inputs.time, dtype)
        embedding, label = time, None
        if options.num_classes:
            label = inputs.label
            if none is not None:
                label = jnp.where(none, options.num_classes, label)
            if options.condition_dropout:
                none = label == options.num_classes
            embedding = time + perturb(self.label(label, dtype))
        elif options.condition_width:
            embedding = time + perturb(self.vector(inputs.label, none, dtype))
        return Condition(
            time=inputs.time,
            time_embedding=time,
            embedding=embedding,
            label=label,
            none=none,
        )

    def uncertainty(self, condition: Condition) -> jax.Array | None:
        """(B,) float32 or wider: u(t) of `losses.uncertainty`; None: not learned."""
        if not self.options.log_variance:
            return None
        u = self.log_variance(condition.time_embedding, ("batch", None))[:, 0]
        return u.astype(module.accumulation_dtype(u.dtype))

    def predict(self, x: jax.Array, condition: Condition) -> jax.Array:
        """(B, S, D) -> (B, H, W, C_out), float32 or wider."""
        options = self.options
        normed = norms.standardized(x, options.norm_eps).astype(x.dtype)
        shift, scale = self.modulation(condition.embedding)
        y = self.output(conditioning.modulate(normed, shift, scale), _TEXT)
        y = y.astype(module.accumulation_dtype(y.dtype))
        size = options.image_size
        return images.unpatchify(y, options.patch_size, size, size)


def _check(options: DiT, inputs: ImageInputs) -> None:
    size, shape = options.image_size, inputs.x.shape
    if shape[1:] != (size, size, options.in_channels):
        raise ValueError(
            f"images of shape {shape[1:]} for a model of image_size={size} and "
            f"in_channels={options.in_channels}"
        )
    has = bool(options.num_classes or options.condition_width)
    if has != (inputs.label is not None):
        which = f"{options.num_classes} classes" * bool(options.num_classes)
        which = which or f"vectors of {options.condition_width}"
        raise ValueError(
            f"label is {'missing' if has else 'given'}: the model's condition is "
            f"{which if has else 'nothing but the time'}"
        )
    if inputs.none is not None and not (has and options.condition_dropout):
        raise ValueError(
            "images without condition need a model that was trained with some: "
            f"condition_dropout={options.condition_dropout}"
        )
