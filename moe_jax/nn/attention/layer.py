"""The attention layer: projections, rotary positions, and one of `ATTENTIONS`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn import linear, module, norms, rope
from moe_jax.nn.attention import scores, sharded
from moe_jax.nn.attention.common import PROJECTED
from moe_jax.parallel import rules
from moe_jax.tree import struct


@struct
class KVCache:
    """Keys and values of the tokens so far, for generation.

    Attributes:
      keys: (B, M, Hkv, Dh), M the longest text that fits.
      values: (B, M, Hkv, Dh).
    """

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Self-attention with rotary positions and optional QK-norm.

    Args:
      d_model: D.
      num_heads: H.
      num_kv_heads: Hkv, divides H.
      head_dim: Dh, even.
      options: of one of `ATTENTIONS`.
      qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020).
      rope_theta: base of the rotary wavelengths.
      norm_eps: of the QK-norm.
      std: deviation of the initial weights.
      out_std: of the output projection.
      dtype: of the weights.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        options: config.AttentionConfig,
        *,
        qk_norm: bool,
        rope_theta: float,
        norm_eps: float,
        std: float,
        out_std: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.options = options
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        heads = ("embed", "heads", None)
        queries = (d_model, num_heads, head_dim)
        shared = (d_model, num_kv_heads, head_dim)
        self.w_q = module.matrix(rngs, queries, heads, std=std, dtype=dtype)
        self.w_k = module.matrix(rngs, shared, heads, std=std, dtype=dtype)
        self.w_v = module.matrix(rngs, shared, heads, std=std, dtype=dtype)
        self.w_o = module.matrix(
            rngs,
            (num_heads, head_dim, d_model),
            ("heads", None, "embed"),
            std=out_std,
            dtype=dtype,
        )
        if qk_norm:
            make = lambda: norms.RMSNorm(head_dim, eps=norm_eps, dtype=dtype, rngs=rngs)
            self.q_norm, self.k_norm = make(), make()

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends within the row, or to a cache that grows.

        Args:
          x: (B, S, D).
          positions: (B, S) int32.
          segments: (B, S) int32; with a cache 1 marks text and 0 padding.
          cache: of what came before; its rows [start, start + S) are written.
          start: () int32, the same for all of the batch.

        Returns:
          (B, S, D), and the cache with the new keys and values.
        """
        weights = (self.w_q, self.w_k, self.w_v)
        made = linear.products(x, ("batch", "sequence", None), weights)
        q, k, v = (checkpoint_name(a, PROJECTED) for a in made)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        # Scaled before it is rounded: a kernel takes only what is scaled.
        q = rope.rotate(q, positions, self.rope_theta, scale=q.shape[-1] ** -0.5)
        k = rope.rotate(k, positions, self.rope_theta)
        q = rules.constrain(q, "batch", "sequence", "heads", None)
        if cache is None:
            mixed = sharded.run(self.options, q, k, v, segments)
        else:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, start, axis=1)
            cache = KVCache(keys=k, values=v)
            # A cache holds one document per row, from position 0 on.
            places = jnp.arange(k.shape[1], dtype=jnp.int32)
            mixed = scores.masked(q, k, v, positions[:, :, None] >= places)
        axes = ("batch", "sequence", "heads", None)
        (out,) = linear.products(mixed, axes, (self.w_o,), contracted=2)
        return out, cache
