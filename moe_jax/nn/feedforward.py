"""Position-wise feed-forward, gated (Shazeer 2020) or not."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn import linear, module
from moe_jax.parallel import rules

# Name of what a hidden layer is made of, before the activation, for rematerialisation.
HIDDEN = "hidden"

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@config.node
class Dense(config.FeedForwardConfig):
    """A dense feed-forward of width `d_ff` in every block.

    Attributes:
      d_ff: width of the hidden layer.
      activation: one of `ACTIVATIONS`.
      gated: `act(x W_gate) * (x W_up)` in place of `act(x W_up)`.
      bias: add a vector after each matrix; it begins at zero.
      clamp: of what is gated; see `hidden_units`. 0: none.
      up_offset: see `hidden_units`.
    """

    d_ff: int = 1024
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    clamp: float = 0.0
    up_offset: float = 0.0

    def problems(self, path, root):
        yield from unit_problems(self, path, root)


def activation_problems(name: str, path: str):
    if name not in ACTIVATIONS:
        yield f"{path}.activation={name!r}: must be one of {sorted(ACTIVATIONS)}"


def unit_problems(options: config.Node, path: str, root: config.Config):
    """The rules of a hidden layer, of `Dense` and of experts."""
    if options.d_ff < 1:
        yield f"{path}.d_ff={options.d_ff}: must be at least 1"
    yield from activation_problems(options.activation, path)
    if options.clamp < 0:
        yield f"{path}.clamp={options.clamp}: must not be negative"
    for name in ("clamp", "up_offset"):
        if getattr(options, name) and not options.gated:
            yield (
                f"{path}.{name}={getattr(options, name)} would be ignored: nothing is "
                "gated; set gated=True, or leave it 0"
            )
    yield from tensor_problems(options.d_ff, f"{path}.d_ff", root)


def tensor_problems(width: int, where: str, root: config.Config):
    tensor = root.mesh.tensor
    if tensor > 0 and width % tensor:
        yield (
            f"{where}={width} is not divisible by config.mesh.tensor={tensor}; "
            f"tensor takes one of {config.divisors(width)}"
        )


def hidden_units(options: config.Node, gate: jax.Array, up: jax.Array) -> jax.Array:
    """`act(gate) * (up + up_offset)`, with both clamped where the options say so.

    The clamp c is that of GPT-OSS (arXiv:2508.10925): `min(gate, c)`, and `up` within
    [-c, c].

    Args:
      options: `Dense`, or experts with the same fields.
      gate: (..., F), before the activation.
      up: (..., F).
    """
    gate, up = checkpoint_name(gate, HIDDEN), checkpoint_name(up, HIDDEN)
    if options.clamp:
        gate = jnp.minimum(gate, options.clamp)
        up = jnp.clip(up, -options.clamp, options.clamp)
    if options.up_offset:
        up = up + options.up_offset
    return ACTIVATIONS[options.activation](gate) * up


class FeedForward(nnx.Module):
    """`W_down (act(x W_gate) * (x W_up))`, or `W_down act(x W_up)` ungated.

    Each matrix may have a bias behind it.

    Args:
      d_model: D.
      options: width, activation, gate.
      std: deviation of the initial weights, or a `module.Draw`.
      out_std: of the output projection.
      dtype: of the weights.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        options: Dense,
        *,
        std: float | module.Draw,
        out_std: float | module.Draw,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.options = options
        into, out = (d_model, options.d_ff), (options.d_ff, d_model)
        if options.gated:
            self.w_gate = module.matrix(
                rngs, into, ("embed", "mlp"), std=std, dtype=dtype
            )
        self.w_up = module.matrix(rngs, into, ("embed", "mlp"), std=std, dtype=dtype)
        self.w_down = module.matrix(
            rngs, out, ("mlp", "embed"), std=out_std, dtype=dtype
        )
        if options.bias:
            if options.gated:
                self.b_gate = module.param(rngs, into[1:], ("mlp",), dtype=dtype)
            self.b_up = module.param(rngs, into[1:], ("mlp",), dtype=dtype)
            self.b_down = module.param(rngs, out[1:], ("embed",), dtype=dtype)

    def _linear(self, x: jax.Array, axis: str | None, *names: str) -> list[jax.Array]:
        axes = ("batch", "sequence", axis)
        weights = tuple(getattr(self, f"w_{name}") for name in names)
        found = list(linear.products(x, axes, weights))
        for i, name in enumerate(names):
            bias = getattr(self, f"b_{name}", None)
            if bias is not None:
                found[i] = found[i] + bias[...].astype(x.dtype)
        return found

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, D)."""
        if self.options.gated:
            up, gate = self._linear(x, None, "up", "gate")
            hidden = hidden_units(self.options, gate, up)
        else:
            (up,) = self._linear(x, None, "up")
            hidden = ACTIVATIONS[self.options.activation](checkpoint_name(up, HIDDEN))
        hidden = rules.constrain(hidden, "batch", "sequence", "mlp")
        (y,) = self._linear(hidden, "mlp", "down")
        return y
