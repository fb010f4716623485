"""The attention that a written rule expects to be fastest.

Short rows take `Scores`; longer ones the platform's kernel where it takes their
shapes, and `Blocked` where not.
"""

import jax

from moe_jax import config
from moe_jax.nn.attention import blocked, cudnn, scores, splash
from moe_jax.nn.attention.common import Segments
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import platform

# Rows up to here take all scores at once. Measured on a CPU: a step with blocks takes
# a little longer at 128 and two thirds at 256. Modelled for TPUs: they are even at 512.
SHORT = {"cpu": 128, "gpu": 256, "tpu": 256}
# Away from the caches of a CPU, fewer and larger products are better (not measured).
LARGE_BLOCK = 512
_ATTENTIONS = {
    scores.Scores: scores.attend,
    blocked.Blocked: blocked.attend,
    splash.Splash: splash.attend,
    cudnn.CuDNN: cudnn.attend,
}


@config.node
class Auto(config.AttentionConfig):
    """`Scores`, `Blocked`, `Splash` or `CuDNN`, each with its defaults.

    Training says which one it is.
    """


def choose(
    where: str, queries: int, keys: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> config.AttentionConfig:
    """Applies the rule.

    Args:
      where: "cpu", "gpu" or "tpu".
      queries: positions of a row on one shard.
      keys: positions of the whole row.
      head_dim: Dh.
      dtype: of the computation.
    """
    if keys <= SHORT.get(where, SHORT["gpu"]):
        return scores.Scores()
    if where == "tpu" and splash.fits(queries):
        # The parts of the queries' gradient that one kernel keeps are few then.
        return splash.Splash(fused_backward=keys <= 2 * splash.Splash().block_kv)
    if where == "gpu" and not cudnn.misfit(dtype, head_dim, queries):
        return cudnn.CuDNN()
    return blocked.Blocked() if where == "cpu" else blocked.Blocked(block=LARGE_BLOCK)


def resolve(
    options: config.AttentionConfig,
    where: str,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
) -> config.AttentionConfig:
    """What an attention becomes: `Auto` its choice, a kernel elsewhere `Blocked`."""
    if isinstance(options, Auto):
        return choose(where, queries, keys, head_dim, dtype)
    home = {splash.Splash: "tpu", cudnn.CuDNN: "gpu"}.get(type(options), where)
    return options if home == where else blocked.Blocked()


def describe(
    options: config.AttentionConfig, length: int, head_dim: int, dtype: str
) -> list[str]:
    """Lines about what the current mesh (`jax.set_mesh`) makes of the options."""
    shards = rules.size(jax.sharding.get_abstract_mesh(), "sequence")
    shapes = (length // shards, length, head_dim, dtype)
    chosen = resolve(options, platform(), *shapes)
    if chosen == options:
        return []
    name = type(options).__name__
    return [
        f"{'auto' if isinstance(options, Auto) else name} attention: "
        f"{type(chosen).__name__} for rows of {length} tokens over {shards} shards, "
        f"{dtype} heads of {head_dim}, on {platform()}"
    ]


def attend(
    options: Auto, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments
) -> jax.Array:
    """Resolves to another attention at trace time; see `ATTENTIONS`."""
    chosen = choose(platform(), q.shape[1], k.shape[1], q.shape[-1], q.dtype)
    return _ATTENTIONS[type(chosen)](chosen, q, k, v, segments)
