"""Attention by cuDNN's kernel for NVIDIA GPUs, through `jax.nn`.

The kernel knows causality but not documents: those come as a mask (B, 1, S, S) that
all heads share, which XLA turns into 2 bytes an entry.
"""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.nn.attention import blocked
from moe_jax.nn.attention.common import Segments
from moe_jax.parallel.mesh import platform

MOST_WIDTH = 128


@config.node
class CuDNN(config.AttentionConfig):
    """A kernel for NVIDIA GPUs; elsewhere `Blocked` computes the same.

    It takes bfloat16, heads of a multiple of 8 up to 128, and rows of even length.
    """


def misfit(dtype: jax.typing.DTypeLike, head_dim: int, length: int) -> str:
    """Why the kernel does not take these shapes; "" where it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} is not bfloat16"
    if head_dim % 8 or head_dim > MOST_WIDTH:
        return f"head_dim={head_dim} is not a multiple of 8 up to {MOST_WIDTH}"
    return f"{length} positions on a shard are odd" if length % 2 else ""


def attend(
    options: CuDNN,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    implementation: str = "cudnn",
) -> jax.Array:
    """See `ATTENTIONS`; `implementation` is that of `jax.nn.dot_product_attention`.

    Raises:
      UserError: on a GPU, types or shapes that the kernel does not take.
    """
    if platform() != "gpu" and implementation == "cudnn":
        return blocked.attend(blocked.Blocked(), q, k, v, segments)
    reason = misfit(q.dtype, q.shape[-1], q.shape[1])
    if reason and implementation == "cudnn":
        raise UserError(
            f"config.model.attention=CuDNN: {reason}; set config.model.attention to "
            "Auto()"
        )
    whole = q.shape[1] == k.shape[1]
    same = segments.queries[:, :, None] == segments.keys[:, None, :]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=(same if whole else segments.mask())[:, None],
        scale=1.0,
        # Blocks above the diagonal are skipped; a shard of the row has no diagonal.
        is_causal=whole,
        implementation=implementation,
    )
