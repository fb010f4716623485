"""The attention that a written rule expects to be fastest.

Short rows take `Scores`; longer ones the platform's kernel where it takes their
shapes, and `Blocked` where not.
"""

import jax

from moe_jax import config
from moe_jax.nn.attention import blocked, cudnn, scores, splash
from moe_jax.nn.attention.common import PLAIN, Call, Scoring, Segments
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


def choose(where: str, call: Call) -> config.AttentionConfig:
    """Applies the rule; `where` is "cpu", "gpu" or "tpu"."""
    if call.keys <= SHORT.get(where, SHORT["gpu"]):
        return scores.Scores()
    if where == "tpu" and not splash.misfit(call):
        # The parts of the queries' gradient that one kernel keeps are few then.
        few = call.keys <= 2 * splash.Splash().block_kv
        return splash.Splash(fused_backward=few)
    if where == "gpu" and not cudnn.misfit(call):
        return cudnn.CuDNN()
    return blocked.Blocked() if where == "cpu" else blocked.Blocked(block=LARGE_BLOCK)


def resolve(
    options: config.AttentionConfig, where: str, call: Call
) -> config.AttentionConfig:
    """What an attention becomes: `Auto` its choice, a kernel elsewhere `Blocked`."""
    if isinstance(options, Auto):
        return choose(where, call)
    home = {splash.Splash: "tpu", cudnn.CuDNN: "gpu"}.get(type(options), where)
    return options if home == where else blocked.Blocked()


def describe(options: config.AttentionConfig, call: Call) -> list[str]:
    """Lines about what the platform makes of the options for a call on one shard."""
    chosen = resolve(options, platform(), call)
    if chosen == options:
        return []
    name = type(options).__name__
    shards = call.keys // call.queries
    width = f"{call.width}"
    if call.value_width != call.width:
        width += f" with values of {call.value_width}"
    extras = [
        "" if call.causal else ", without causality",
        f", a window of {call.window}" if call.window else "",
        f", a softcap of {call.softcap:g}" if call.softcap else "",
        ", sinks" if call.sinks else "",
    ]
    return [
        f"{'auto' if isinstance(options, Auto) else name} attention: "
        f"{type(chosen).__name__} for rows of {call.keys} tokens over {shards} shards, "
        f"{call.dtype} heads of {width}{''.join(extras)}, on {platform()}"
    ]


def attend(
    options: Auto,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Resolves to another attention at trace time; see `ATTENTIONS`."""
    chosen = choose(platform(), Call.of(q, k, v, scoring))
    return _ATTENTIONS[type(chosen)](chosen, q, k, v, segments, scoring)
