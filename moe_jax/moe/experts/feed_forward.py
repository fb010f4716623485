"""Experts that are feed-forwards, gated (Shazeer 2020) or not."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, PyTree
from moe_jax.nn import feedforward, module


@config.node
class ExpertFeedForward(config.ExpertsConfig):
    """One feed-forward of width `d_ff` an expert.

    Attributes:
      d_ff: F.
      activation: one of `nn.feedforward.ACTIVATIONS`.
      gated: `act(x W_gate) * (x W_up)` in place of `act(x W_up)`.
    """

    d_ff: int = 512
    activation: str = "silu"
    gated: bool = True

    def problems(self, path, root):
        if self.d_ff < 1:
            yield f"{path}.d_ff={self.d_ff}: must be at least 1"
        yield from feedforward.activation_problems(self.activation, path)
        yield from feedforward.tensor_problems(self.d_ff, f"{path}.d_ff", root)


def _matmul(rows: Array, w: Array, group_sizes: Array | None) -> Array:
    w = w.astype(rows.dtype)
    if group_sizes is None:
        return jnp.einsum("ecx,exy->ecy", rows, w)
    return jax.lax.ragged_dot(rows, w, group_sizes)


class FeedForwardExperts(nnx.Module):
    """Stacked `W_down (act(x W_gate) * (x W_up))`."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        options: ExpertFeedForward,
        *,
        std: float,
        out_std: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.act = feedforward.ACTIVATIONS[options.activation]
        into = (num_experts, d_model, options.d_ff)
        out = (num_experts, options.d_ff, d_model)
        axes = ("expert", "expert_embed", "mlp")
        if options.gated:
            self.w_gate = module.param(rngs, into, axes, std=std, dtype=dtype)
        self.w_up = module.param(rngs, into, axes, std=std, dtype=dtype)
        self.w_down = module.param(
            rngs, out, ("expert", "mlp", "expert_embed"), std=out_std, dtype=dtype
        )

    def _params(self) -> dict[str, nnx.Param]:
        names = ("w_gate", "w_up", "w_down")
        return {n: getattr(self, n) for n in names if hasattr(self, n)}

    def weights(self) -> dict[str, Array]:
        return {name: p[...] for name, p in self._params().items()}

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        return {name: p.axes for name, p in self._params().items()}

    def before(self, rows: PyTree) -> PyTree:
        """Rows cross as they are."""
        return rows

    def rows(
        self,
        weights: dict[str, Array],
        rows: PyTree,
        group_sizes: Array | None = None,
    ) -> Array:
        """(e, C, D) -> (e, C, D), or (R, D) -> (R, D) with group sizes (e,).

        With F split over `tensor` the result is this shard's part of a sum.
        """
        x = rows["features"]
        hidden = _matmul(x, weights["w_up"], group_sizes)
        if "w_gate" in weights:
            hidden = self.act(_matmul(x, weights["w_gate"], group_sizes)) * hidden
        else:
            hidden = self.act(hidden)
        return _matmul(hidden, weights["w_down"], group_sizes)

    def after(self, y: Array) -> Array:
        """The combined output as it is."""
        return y
