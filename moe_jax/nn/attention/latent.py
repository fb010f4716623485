"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, equations 37 to 47).

Keys and values of all heads are made from one short vector a token, the latent, and one
rotary key that all heads share. A cache holds those two; each use of it expands them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn import linear, module, norms, rope
from moe_jax.nn.attention.common import PROJECTED
from moe_jax.nn.attention.layer import SelfAttention
from moe_jax.tree import struct

_TEXT = ("batch", "sequence", None)


@config.node
class LatentAttention(config.Node):
    """Sizes of multi-head latent attention.

    Attributes:
      query_rank: of the latent that queries are made from; 0: from x itself.
      kv_rank: of the latent that keys and values are made from.
      nope_dim: width of a head's queries and keys that does not turn.
      rope_dim: width that turns.
      value_dim: width of a head's values.
    """

    query_rank: int = 0
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128

    def problems(self, path, root):
        least = dict(query_rank=0, kv_rank=1, nope_dim=1, rope_dim=2, value_dim=1)
        for name, size in least.items():
            if getattr(self, name) < size:
                yield f"{path}.{name}={getattr(self, name)}: must be at least {size}"
        parts = root.mesh.fsdp * root.mesh.expert
        for name in ("query_rank", "kv_rank"):
            if parts > 0 and getattr(self, name) % parts:
                yield (
                    f"{path}.{name}={getattr(self, name)} is not divisible by "
                    f"config.mesh.fsdp * mesh.expert={parts}"
                )


@struct
class LatentCache:
    """What is kept of the tokens so far, for generation.

    Attributes:
      latents: (B, M, Rkv), normed; M the longest text that fits.
      keys: (B, M, rope_dim), turned.
    """

    latents: jax.Array
    keys: jax.Array


class LatentSelfAttention(SelfAttention):
    """Self-attention whose keys and values are made from a latent.

    Args:
      d_model: D.
      num_heads: H.
      sizes: of latents and heads.
      options: of one of `ATTENTIONS`.
      norm_eps: of the norms of the latents.
      std: deviation of the initial weights.
      rest: of `SelfAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        sizes: LatentAttention,
        options: config.AttentionConfig,
        *,
        norm_eps: float,
        std: float,
        dtype: str,
        rngs: nnx.Rngs,
        **rest,
    ):
        self.sizes = sizes
        make = lambda *shape, axes: module.matrix(
            rngs, shape, axes, std=std, dtype=dtype
        )
        norm = lambda rank: norms.RMSNorm(rank, eps=norm_eps, dtype=dtype, rngs=rngs)
        heads, down = ("embed", "heads", None), ("embed", None)
        query = sizes.nope_dim + sizes.rope_dim
        if sizes.query_rank:
            self.w_q_down = make(d_model, sizes.query_rank, axes=down)
            self.q_norm = norm(sizes.query_rank)
            self.w_q_up = make(sizes.query_rank, num_heads, query, axes=heads)
        else:
            self.w_q = make(d_model, num_heads, query, axes=heads)
        self.w_kv_down = make(d_model, sizes.kv_rank + sizes.rope_dim, axes=down)
        self.kv_norm = norm(sizes.kv_rank)
        made = sizes.nope_dim + sizes.value_dim
        self.w_kv_up = make(sizes.kv_rank, num_heads, made, axes=heads)
        super().__init__(
            d_model, num_heads, sizes.value_dim, options, dtype=dtype, rngs=rngs, **rest
        )

    def init_cache(self, batch: int, length: int, dtype: str) -> LatentCache:
        """An empty cache for `batch` texts of at most `length` tokens."""
        zeros = lambda width: jnp.zeros((batch, length, width), dtype)
        return LatentCache(
            latents=zeros(self.sizes.kv_rank), keys=zeros(self.sizes.rope_dim)
        )

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, S, H, nope + rope), latents (B, S, Rkv), keys (B, S, rope)."""
        product = lambda x, *weights: [
            checkpoint_name(a, PROJECTED) for a in linear.products(x, _TEXT, weights)
        ]
        if self.sizes.query_rank:
            q, down = product(x, self.w_q_down, self.w_kv_down)
            (q,) = product(self.q_norm(q), self.w_q_up)
        else:
            # Not at once: only one of them is split over heads.
            (q,), (down,) = product(x, self.w_q), product(x, self.w_kv_down)
        latents, keys = jnp.split(down, [self.sizes.kv_rank], axis=-1)
        return q, self.kv_norm(latents), keys

    def _expand(self, latents: jax.Array, keys: jax.Array):
        """Keys (B, M, H, nope + rope) and values (B, M, H, v) of all heads."""
        (made,) = linear.products(latents, _TEXT, (self.w_kv_up,))
        made = checkpoint_name(made, PROJECTED)
        k, v = jnp.split(made, [self.sizes.nope_dim], axis=-1)
        shared = jnp.broadcast_to(
            keys[:, :, None], (*k.shape[:-1], self.sizes.rope_dim)
        )
        return jnp.concatenate([k, shared], axis=-1), v

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: LatentCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LatentCache | None]:
        """See `Attention.__call__`."""
        q, latents, keys = self._project(x)
        length = x.shape[1] if cache is None else cache.keys.shape[1]
        turn = lambda a, scale: rope.rotate(
            a, positions, self.rope, length=length, scale=scale
        )
        scale = q.shape[-1] ** -0.5 * rope.latent_scale(self.rope)
        still, turned = jnp.split(q, [self.sizes.nope_dim], axis=-1)
        wide = still.astype(module.accumulation_dtype(q.dtype)) * scale
        q = jnp.concatenate([wide.astype(q.dtype), turn(turned, scale)], axis=-1)
        keys = turn(keys[:, :, None], 1.0)[:, :, 0]
        if cache is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            latents = write(cache.latents, latents, start, axis=1)
            keys = write(cache.keys, keys, start, axis=1)
            cache = LatentCache(latents=latents, keys=keys)
        k, v = self._expand(latents, keys)
        mixed = self._mix(q, k, v, positions, segments, cache is not None)
        return self._out(mixed), cache
