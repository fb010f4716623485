"""Attention by cuDNN's kernel for NVIDIA GPUs, through `jax.nn`.

The kernel knows causality and windows but not documents: those come as a mask
(B, 1, S, S) that all heads share, which XLA turns into 2 bytes an entry. It has no cap
and no sinks.
"""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.nn.attention import blocked
from moe_jax.nn.attention.common import PLAIN, Call, Scoring, Segments
from moe_jax.parallel.mesh import platform

MOST_WIDTH = 128


@config.node
class CuDNN(config.AttentionConfig):
    """A kernel for NVIDIA GPUs; elsewhere `Blocked` computes the same.

    It takes bfloat16, heads of a multiple of 8 up to 128, and rows of even length.
    """


def misfit(call: Call) -> str:
    """Why the kernel does not take a call; "" where it does."""
    if jnp.dtype(call.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(call.dtype)} is not bfloat16"
    if call.width % 8 or call.width > MOST_WIDTH:
        return f"head_dim={call.width} is not a multiple of 8 up to {MOST_WIDTH}"
    if call.value_width != call.width:
        return f"values of {call.value_width} are not as wide as keys of {call.width}"
    if call.softcap or call.sinks:
        return "it has no softcap and no sinks"
    return f"{call.queries} positions on a shard are odd" if call.queries % 2 else ""


def attend(
    options: CuDNN,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    scoring: Scoring = PLAIN,
    implementation: str = "cudnn",
) -> jax.Array:
    """See `ATTENTIONS`; `implementation` is that of `jax.nn.dot_product_attention`.

    Raises:
      UserError: on a GPU, types or shapes that the kernel does not take.
    """
    if platform() != "gpu" and implementation == "cudnn":
        return blocked.attend(blocked.Blocked(), q, k, v, segments, scoring)
    reason = misfit(Call.of(q, k, v, scoring))
    if reason and implementation == "cudnn":
        raise UserError(
            f"config.model.attention=CuDNN: {reason}; set config.model.attention to "
            "Auto()"
        )
    whole, window = q.shape[1] == k.shape[1], scoring.window
    same = segments.queries[:, :, None] == segments.keys[:, None, :]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=(same if whole else segments.mask(scoring))[:, None],
        scale=1.0,
        # Blocks above the diagonal are skipped, and those before the window; a shard of
        # the row has no diagonal.
        is_causal=whole and scoring.causal,
        local_window_size=(window - 1, 0) if whole and window else None,
        implementation=implementation,
    )
