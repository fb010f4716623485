"""What the attentions share: which keys a query sees, and a name for their results."""

import jax
import jax.numpy as jnp

from moe_jax.nn import module
from moe_jax.tree import struct

# A rematerialisation policy that saves this name does not attend again: it stands on
# the output and on the log-sum-exp of the scores, all that a derivative needs.
ATTENDED = "attended"
# On queries, keys and values, before they are normed and turned.
PROJECTED = "projected"


@struct
class Segments:
    """Documents of the rows, from which follows who sees whom.

    A query sees the keys of its own document that do not come later in the row. So it
    always sees itself, padding too.

    Attributes:
      queries: (B, S) int32, document of each query; padding is one too.
      keys: (B, M) int32, those of the whole row.
      first: () int32, place of the first query in the row.
    """

    queries: jax.Array
    keys: jax.Array
    first: jax.Array | int = 0

    def mask(self) -> jax.Array:
        """(B, S, M) bool: which query sees which key."""
        query_places = self.first + jnp.arange(self.queries.shape[1])
        key_places = jnp.arange(self.keys.shape[1])
        same = self.queries[:, :, None] == self.keys[:, None, :]
        return same & (query_places[:, None] >= key_places)


def masked_out(dtype: jax.typing.DTypeLike) -> float:
    """The score of a key that is not seen.

    A finite number: where nothing is seen yet, -inf - -inf would be NaN.
    """
    return -0.7 * float(jnp.finfo(dtype).max)


def score_dtype(q: jax.Array) -> jnp.dtype:
    """Type of scores and softmax: float32, or float64 where the queries are."""
    return module.accumulation_dtype(q.dtype)
