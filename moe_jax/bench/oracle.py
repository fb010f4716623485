"""The results that a dispatch should have, and how far its own are from them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from moe_jax.bench import layer as layer_lib
from moe_jax.bench.layer import Inputs, Layer
from moe_jax.moe.dispatch.dense import DenseDispatch

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 1e-1}
# Elements of what the dense dispatch holds at once.
_MOST_ELEMENTS = 2**25


class Oracle:
    """`DenseDispatch` on one device, in double precision (on TPUs in single)."""

    def __init__(self, layer: Layer, inputs: Inputs):
        on_tpu = jax.default_backend() == "tpu" and layer.dtype != "float64"
        self._layer, self._dtype = layer, "float32" if on_tpu else "float64"
        wide = lambda a: np.asarray(a).astype(self._dtype)
        self._inputs = dataclasses.replace(
            inputs,
            weights=jax.tree.map(wide, inputs.weights),
            x=wide(inputs.x).reshape(-1, layer.d_model),
            weight=wide(inputs.weight).reshape(-1, layer.top_k),
            grad=wide(inputs.grad).reshape(-1, layer.d_model),
        )
        self._run = jax.jit(layer_lib.forward_and_backward(layer, DenseDispatch()))

    def __call__(
        self, expert_tk: np.ndarray, valid_tk: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Output and gradients by name; rows of tokens are (T, ...)."""
        given, parts = self._inputs, []
        size = self._tokens_at_once()
        double = jax.enable_x64(self._dtype == "float64")
        with double, jax.default_matmul_precision("highest"):
            for first in range(0, self._layer.tokens, size):
                cut = lambda a, first=first: a[None, first : first + size]
                results, _ = self._run(
                    given.weights,
                    *map(cut, (given.x, given.weight, given.grad)),
                    *map(cut, (expert_tk, valid_tk)),
                )
                parts.append(jax.device_get(results))
        of_weights = {layer_lib.OF + name for name in given.weights}
        rows = lambda name: np.concatenate([part[name][0] for part in parts])
        return {
            name: sum(p[name] for p in parts) if name in of_weights else rows(name)
            for name in sorted(parts[0], key=lambda name: name != layer_lib.OUTPUT)
        }

    def _tokens_at_once(self) -> int:
        """The largest divisor of T that keeps every expert on every token small."""
        layer = self._layer
        a_token = layer.num_experts * (layer.d_model + 3 * layer.d_ff)
        most = max(1, _MOST_ELEMENTS // a_token)
        return max(
            n for n in range(1, layer.tokens + 1) if _fits(layer.tokens, n, most)
        )


def _fits(tokens: int, size: int, most: int) -> bool:
    return tokens % size == 0 and size <= most


def errors(found: dict[str, Any], want: dict[str, np.ndarray]) -> dict[str, float]:
    """By name: the largest difference of a row over the size of a row.

    A row belongs to a token, or to an expert; its size is the root mean square of the
    norms of those rows of `want` that are not zero. So one wrong row among thousands
    is as large as it is among ten. Where all of `want` is zero: the difference itself.
    """
    return {name: _error(found[name], want[name]) for name in want}


def _error(found: Any, want: np.ndarray) -> float:
    want = np.asarray(want, np.float64).reshape(want.shape[0], -1)
    gap = np.asarray(found).astype(np.float64).reshape(want.shape) - want
    worst = float(np.max(np.linalg.norm(gap, axis=1)))
    norms = np.linalg.norm(want, axis=1)
    norms = norms[norms != 0]
    return worst / float(np.sqrt(np.mean(norms**2))) if norms.size else worst


def served(
    valid_tk: np.ndarray,
    found_tk: np.ndarray,
    want_tk: np.ndarray,
    dropped: int,
) -> np.ndarray | None:
    """Which choices were served, (T, K) bool: all valid ones but `dropped`.

    The output does not depend on the combine weight of a choice that was dropped: that
    gradient is exactly zero. Where more are zero than were dropped, those are taken
    for dropped whose gradient should be the largest.

    Args:
      valid_tk: (T, K) bool.
      found_tk: (T, K), gradient of the combine weights.
      want_tk: (T, K), the same where nothing is dropped.
      dropped: choices that were dropped, by the statistics.

    Returns:
      None where fewer choices than `dropped` were.
    """
    missing_tk = valid_tk & (np.asarray(found_tk) == 0)
    if not 0 <= dropped <= missing_tk.sum():
        return None
    size_n = np.where(missing_tk, np.abs(want_tk), -1.0).reshape(-1)
    served_n = valid_tk.reshape(-1).copy()
    served_n[np.argsort(-size_n, kind="stable")[:dropped]] = False
    return served_n.reshape(valid_tk.shape)
