"""Attention on a mesh: rows over the batch axes, heads over `tensor`, S over `context`.

Without a mesh (`jax.set_mesh`) the same code runs on the rows at hand.
"""

import jax

from moe_jax import config
from moe_jax.nn.attention import ATTENTIONS
from moe_jax.nn.attention.common import PLAIN, Scoring, Segments
from moe_jax.parallel import rules

_HEADS = ("batch", "sequence", "heads", None)
_PLACES = ("batch", "sequence")


def run(
    options: config.AttentionConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Attends within rows.

    Where `context` splits the sequence, keys and values of the whole row are gathered
    (few heads, with grouped queries; the derivative is a reduce-scatter), and each
    shard attends with its own queries.

    Args:
      options: of one of `ATTENTIONS`.
      q: (B, S, H, Dh), scaled.
      k: (B, S, Hkv, Dh).
      v: (B, S, Hkv, Dv).
      segments: (B, S) int32, document of each position.
      scoring: window, cap and sinks.

    Returns:
      (B, S, H, Dv) in the type of q.
    """
    attend = ATTENTIONS[type(options)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        both = Segments(queries=segments, keys=segments)
        return attend(options, q, k, v, both, scoring)
    split = rules.size(mesh, "sequence") > 1
    names = rules.mesh_axes("sequence")

    def whole(x):
        return jax.lax.all_gather(x, names, axis=1, tiled=True) if split else x

    def local(q, k, v, segments, scoring):
        first = jax.lax.axis_index(names) * q.shape[1] if split else 0
        of = Segments(queries=segments, keys=whole(segments), first=first)
        return attend(options, q, whole(k), whole(v), of, scoring)

    heads, places = rules.spec(_HEADS), rules.spec(_PLACES)
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, places, rules.spec(_HEADS[2:3])),
        out_specs=heads,
        # Kernels do not say over which axes their results differ. Of what has a
        # derivative only sinks are replicated, and theirs is summed all the same.
        check_vma=False,
    )(q, k, v, segments, scoring)
