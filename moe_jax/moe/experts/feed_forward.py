"""Experts that are feed-forwards, gated (Shazeer 2020) or not."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.kernels import grouped_matmul
from moe_jax.moe.routing import Array, PyTree
from moe_jax.nn import feedforward, module
from moe_jax.nn.feedforward import HIDDEN


@config.node
class ExpertFeedForward(config.ExpertsConfig):
    """One feed-forward of width `d_ff` an expert.

    Attributes:
      d_ff: F.
      activation: one of `nn.feedforward.ACTIVATIONS`.
      gated: `act(x W_gate) * (x W_up)` in place of `act(x W_up)`.
      bias: add a vector after each matrix; it begins at zero.
      clamp: of what is gated; see `nn.feedforward.hidden_units`. 0: none.
      up_offset: see there.
    """

    d_ff: int = 512
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    clamp: float = 0.0
    up_offset: float = 0.0

    def problems(self, path, root):
        yield from feedforward.unit_problems(self, path, root)


def _of_groups(b_ey: Array, group_sizes: Array, count: int) -> Array:
    """(e, Y) -> (R, Y): each row's expert's vector; zero for rows of nobody.

    A matmul with ones, whose derivative is another: that of an indexing would scatter.
    """
    ends_e = jnp.cumsum(group_sizes)
    row_r1 = jnp.arange(count, dtype=ends_e.dtype)[:, None]
    owner_re = (row_r1 >= ends_e - group_sizes) & (row_r1 < ends_e)
    return jnp.matmul(owner_re.astype(b_ey.dtype), b_ey, precision="highest")


def _linear(
    rows: Array,
    weights: dict[str, Array],
    name: str,
    group_sizes: Array | None,
    scale: Array | None = None,
) -> Array:
    """`x W + b` with the weights `w_name` and, where there is one, `b_name`.

    With a scale (R,), of which x has its part: `x W + scale b`.
    """
    w, b = weights[f"w_{name}"].astype(rows.dtype), weights.get(f"b_{name}")
    if group_sizes is None:
        out = jnp.einsum("ecx,exy->ecy", rows, w)
        return out if b is None else out + b[:, None, :].astype(rows.dtype)
    out = grouped_matmul.matmul(rows, w, group_sizes)
    if b is None:
        return out
    bias = _of_groups(b.astype(rows.dtype), group_sizes, rows.shape[0])
    if scale is not None:
        bias = bias * scale[:, None].astype(bias.dtype)
    out = out + bias
    # What lies in rows of nobody may be infinite, and would reach the gradient of b.
    held_r = jnp.arange(rows.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(held_r[:, None], out, 0)


class FeedForwardExperts(nnx.Module):
    """Stacked `W_down (act(x W_gate) * (x W_up))`, each with a bias or without."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        options: ExpertFeedForward,
        *,
        std: float | module.Draw,
        out_std: float | module.Draw,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.options = options
        into = (num_experts, d_model, options.d_ff)
        out = (num_experts, options.d_ff, d_model)
        axes = ("expert", "expert_embed", "expert_mlp")
        out_axes = ("expert", "expert_mlp", "expert_embed")
        self.first = "w_gate" if options.gated else "w_up"
        if options.gated:
            self.w_gate = module.matrix(rngs, into, axes, std=std, dtype=dtype)
        self.w_up = module.matrix(rngs, into, axes, std=std, dtype=dtype)
        self.w_down = module.matrix(
            rngs,
            out,
            ("expert", "expert_mlp", "expert_embed"),
            std=out_std,
            dtype=dtype,
        )
        self.output_biases = ("b_down",) if options.bias else ()
        if options.bias:
            zeros = functools.partial(module.param, rngs, dtype=dtype)
            hidden, hidden_axes = into[::2], axes[::2]
            if options.gated:
                self.b_gate = zeros(hidden, hidden_axes)
            self.b_up = zeros(hidden, hidden_axes)
            self.b_down = zeros(out[::2], out_axes[::2])

    def _params(self) -> dict[str, nnx.Param]:
        names = ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")
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
        scale: Array | None = None,
    ) -> Array:
        """(e, C, D) -> (e, C, D), or (R, D) -> (R, D) with group sizes (e,).

        A scale (R,) multiplies the results of the rows; it is applied to what the last
        matrix meets, so that for its gradient no result need be kept. With F split
        over `tensor` the result is this shard's part of a sum. What comes out for rows
        beyond the groups means nothing.
        """
        into = lambda name: _linear(rows["features"], weights, name, group_sizes)
        if "w_gate" in weights:
            gate, up = into("gate"), into("up")
            hidden = feedforward.hidden_units(self.options, gate, up)
        else:
            act = feedforward.ACTIVATIONS[self.options.activation]
            hidden = act(checkpoint_name(into("up"), HIDDEN))
        if scale is not None:
            hidden = hidden * scale[:, None].astype(hidden.dtype)
        return _linear(hidden, weights, "down", group_sizes, scale)

    def after(self, y: Array) -> Array:
        """The combined output as it is."""
        return y
