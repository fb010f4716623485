"""The attention layer: projections, rotary positions, and one of `ATTENTIONS`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn import linear, module, norms
from moe_jax.nn.attention import scores, sharded
from moe_jax.nn.attention.common import PROJECTED, Scoring, in_reach
from moe_jax.nn.rope import Rope, rotate
from moe_jax.parallel import rules
from moe_jax.tree import struct

# What queries and keys are normed over: nothing, each head, or all heads together.
QK_NORMS = ("none", "head", "layer", "projection")
_TEXT = ("batch", "sequence", None)


@struct
class KVCache:
    """Keys and values of the tokens so far, for generation.

    Attributes:
      keys: (B, M, Hkv, Dh), M the longest text that fits.
      values: (B, M, Hkv, Dh).
    """

    keys: jax.Array
    values: jax.Array


class SelfAttention(nnx.Module):
    """What the attention layers share: mixing values, and the way out.

    Args:
      d_model: D.
      num_heads: H.
      value_width: Dv.
      options: of one of `ATTENTIONS`.
      rope: how queries and keys turn; None: they do not.
      causal: whether a query sees no later position.
      window: positions that a query sees, itself included; 0: all before it.
      softcap: of the scores; 0: none.
      sinks: whether each head has a learned score without a value.
      output_bias: whether there is a bias after the output projection.
      out_std: deviation of the output projection.
      dtype: of the weights.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        value_width: int,
        options: config.AttentionConfig,
        *,
        rope: Rope | None,
        causal: bool = True,
        window: int = 0,
        softcap: float = 0.0,
        sinks: bool = False,
        output_bias: bool = False,
        out_std: float | module.Draw,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.options, self.rope = options, rope
        self.causal, self.window, self.softcap = causal, window, softcap
        self.has_sinks, self.has_output_bias = sinks, output_bias
        out = (num_heads, value_width, d_model)
        axes = ("heads", None, "embed")
        self.w_o = module.matrix(rngs, out, axes, std=out_std, dtype=dtype)
        if output_bias:
            self.b_o = module.param(rngs, (d_model,), ("embed",), dtype=dtype)
        if sinks:
            self.sinks = module.param(rngs, (num_heads,), ("heads",), dtype=dtype)

    def _mix(self, q, k, v, positions, segments, cached: bool) -> jax.Array:
        """(B, S, H, Dv): over the row, or over a cache of one document a row."""
        sinks = self.sinks[...] if self.has_sinks else None
        scoring = Scoring(
            window=self.window, softcap=self.softcap, sinks=sinks, causal=self.causal
        )
        q = rules.constrain(q, "batch", "sequence", "heads", None)
        if not cached:
            return sharded.run(self.options, q, k, v, segments, scoring)
        if not self.causal:
            raise ValueError("a cache grows with a text: causal=False has none")
        # A cache holds one document per row, from position 0 on.
        places = jnp.arange(k.shape[1], dtype=jnp.int32)
        mask = in_reach(positions[:, :, None], places, self.window)
        return scores.masked(q, k, v, mask, scoring)

    def _out(self, mixed: jax.Array) -> jax.Array:
        """(B, S, H, Dv) -> (B, S, D)."""
        axes = ("batch", "sequence", "heads", None)
        (out,) = linear.products(mixed, axes, (self.w_o,), contracted=2)
        if self.has_output_bias:
            out = out + self.b_o[...].astype(out.dtype)
        return out


class Attention(SelfAttention):
    """Self-attention with rotary positions, grouped queries and optional QK-norm.

    Args:
      d_model: D.
      num_heads: H.
      num_kv_heads: Hkv, divides H.
      head_dim: Dh.
      options: of one of `ATTENTIONS`.
      qk_norm: of `QK_NORMS`: "head" RMS-normalises queries and keys per head (Henry et
        al. 2020), "projection" over all heads at once (OLMoE); "layer" takes a
        LayerNorm with scale and bias per head (ViT-22B, Dehghani et al. 2023).
      bias: whether queries, keys and values have biases.
      clip: queries, keys and values are cut to [-clip, clip] after their norm (OLMoE);
        0: they are not.
      norm_eps: of the QK-norm.
      std: deviation of the initial weights, or a `module.Draw`.
      rest: of `SelfAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        options: config.AttentionConfig,
        *,
        qk_norm: str = "none",
        bias: bool = False,
        clip: float = 0.0,
        norm_eps: float,
        std: float | module.Draw,
        dtype: str,
        rngs: nnx.Rngs,
        **rest,
    ):
        self.qk_norm, self.has_bias, self.clip = qk_norm, bias, clip
        self.head_dim, self.num_kv_heads = head_dim, num_kv_heads
        heads = ("embed", "heads", None)
        queries = (d_model, num_heads, head_dim)
        shared = (d_model, num_kv_heads, head_dim)
        for name, shape in (("q", queries), ("k", shared), ("v", shared)):
            weight = module.matrix(rngs, shape, heads, std=std, dtype=dtype)
            setattr(self, f"w_{name}", weight)
            if bias:
                weight = module.param(rngs, shape[1:], heads[1:], dtype=dtype)
                setattr(self, f"b_{name}", weight)
        super().__init__(
            d_model, num_heads, head_dim, options, dtype=dtype, rngs=rngs, **rest
        )
        if qk_norm == "none":
            return
        for name, shape in (("q", queries), ("k", shared)):
            over = dict(width=head_dim)
            if qk_norm == "projection":
                over = dict(width=shape[1:], axes=heads[1:])
            make = norms.LayerNorm if qk_norm == "layer" else norms.RMSNorm
            norm = make(**over, eps=norm_eps, dtype=dtype, rngs=rngs)
            setattr(self, f"{name}_norm", norm)

    def init_cache(self, batch: int, length: int, dtype: str) -> KVCache:
        """An empty cache for `batch` texts of at most `length` tokens."""
        shape = (batch, length, self.num_kv_heads, self.head_dim)
        return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """Queries (B, S, H, Dh), keys and values (B, S, Hkv, Dh), not yet turned."""
        made = linear.products(x, _TEXT, (self.w_q, self.w_k, self.w_v))
        made = [checkpoint_name(a, PROJECTED) for a in made]
        if self.has_bias:
            biases = (self.b_q, self.b_k, self.b_v)
            made = [
                a + b[...].astype(a.dtype) for a, b in zip(made, biases, strict=True)
            ]
        if self.qk_norm != "none":
            made[:2] = self.q_norm(made[0]), self.k_norm(made[1])
        if self.clip:
            made = [jnp.clip(a, -self.clip, self.clip) for a in made]
        return made

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends within the row, or to a cache that grows.

        Args:
          x: (B, S, D).
          positions: (B, S) int32; None where nothing turns.
          segments: (B, S) int32; with a cache 1 marks text and 0 padding.
          cache: of what came before; its rows [start, start + S) are written.
          start: () int32, the same for all of the batch.

        Returns:
          (B, S, D), and the cache with the new keys and values.
        """
        q, k, v = self._project(x)
        length = x.shape[1] if cache is None else cache.keys.shape[1]
        # Scaled before it is rounded: a kernel takes only what is scaled.
        scale = q.shape[-1] ** -0.5
        if self.rope is None:
            q = (q.astype(module.accumulation_dtype(q.dtype)) * scale).astype(q.dtype)
        else:
            q = rotate(q, positions, self.rope, length=length, scale=scale)
            k = rotate(k, positions, self.rope, length=length)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, start, axis=1)
            cache = KVCache(keys=k, values=v)
        mixed = self._mix(q, k, v, positions, segments, cache is not None)
        return self._out(mixed), cache
