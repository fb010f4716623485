"""The experts of one MoE layer with a routing from outside: forward and backward."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import DispatchConfig, MeshConfig
from moe_jax.moe import sharded
from moe_jax.moe.experts import EXPERTS
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.routing import Assignments, DispatchStats, PyTree
from moe_jax.nn import module
from moe_jax.parallel import rules

# Names of results.
OUTPUT = "output"
OF = "gradient of "
COMBINE = f"{OF}combine weights"

_EXPERT_AXES = rules.RULES["expert"]
_BATCH, _SEQUENCE = rules.RULES["batch"], rules.RULES["sequence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What the dispatches have to serve: gated feed-forwards as experts.

    Attributes:
      tokens: T, over the whole mesh.
      d_model: D.
      d_ff: F.
      num_experts: E.
      top_k: K.
      dtype: of the computation.
    """

    tokens: int = 1024
    d_model: int = 64
    d_ff: int = 128
    num_experts: int = 16
    top_k: int = 2
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays of a layer, differentiable.

    Attributes:
      weights: of the experts, each with a leading E.
      x: (B, S, D).
      weight: (B, S, K), what multiplies the experts' outputs.
      grad: (B, S, D), the gradient of the output.
    """

    weights: PyTree
    x: Any
    weight: Any
    grad: Any


def _product(mesh: MeshConfig, axes: tuple[str, ...]) -> int:
    return math.prod(getattr(mesh, axis) for axis in axes)


def token_shards(mesh: MeshConfig) -> int:
    return _product(mesh, _BATCH + _SEQUENCE)


def expert_shards(mesh: MeshConfig) -> int:
    return _product(mesh, _EXPERT_AXES)


def problems(layer: Layer, mesh: MeshConfig) -> Iterator[str]:
    """What keeps a mesh from splitting the layer: value, rule and mend."""
    if layer.top_k > layer.num_experts:
        yield (
            f"--top_k={layer.top_k} is more than --num_experts={layer.num_experts}: "
            "the experts of a token are distinct"
        )
    for name, axes in (
        ("tokens", _BATCH + _SEQUENCE),
        ("num_experts", _EXPERT_AXES),
        ("d_model", rules.RULES["expert_embed"]),
        ("d_ff", rules.RULES["expert_mlp"]),
    ):
        value, shards = getattr(layer, name), _product(mesh, axes)
        if value % shards:
            yield (
                f"--{name}={value} is not divisible by {' * '.join(axes)} = {shards} "
                f"of the mesh; set it to a multiple of {shards}"
            )


@functools.cache
def experts(layer: Layer) -> module.Template:
    """The experts' code and the axes of their weights."""
    options = ExpertFeedForward(d_ff=layer.d_ff)

    def build(rngs):
        return EXPERTS[ExpertFeedForward](
            layer.d_model,
            layer.num_experts,
            options,
            std=layer.d_model**-0.5,
            out_std=layer.d_ff**-0.5,
            dtype="float32",
            rngs=rngs,
        )

    return module.Template(build)


def draw(layer: Layer, batch_shards: int, seed: int) -> Inputs:
    """Random inputs on the host; `batch_shards` is B, so that S is T / B.

    All are numbers of the layer's type; as in training, weights are stored in at least
    float32 and rounded when they are used.
    """
    rng = np.random.default_rng(seed)
    wide = module.accumulation_dtype(layer.dtype)

    def normal(shape, std=1.0):
        return (rng.normal(size=shape) * std).astype(jnp.dtype(layer.dtype))

    shapes = jax.eval_shape(experts(layer).init, jax.random.key(0))
    shape = (batch_shards, layer.tokens // batch_shards)
    return Inputs(
        weights={
            name: normal(like.shape, like.shape[1] ** -0.5).astype(wide)
            for name, like in shapes.items()
        },
        x=normal((*shape, layer.d_model)),
        weight=rng.uniform(0.2, 1.0, (*shape, layer.top_k)).astype(wide),
        grad=normal((*shape, layer.d_model)),
    )


def forward_and_backward(
    layer: Layer, options: DispatchConfig
) -> Callable[..., tuple[dict[str, jax.Array], DispatchStats]]:
    """`(weights, x, weight, grad, expert, valid) -> results, statistics`, to be jitted.

    The first four are those of `Inputs`; expert and valid are (B, S, K). Results by
    name: the output (B, S, D) and the gradients of all that is differentiable.
    """
    template = experts(layer)

    def run(weights, x, weight, grad, expert, valid):
        flat = lambda a: a.reshape(-1, layer.top_k)

        def forward(weights, x, weight):
            routing = Assignments(
                expert_tk=flat(expert),
                weight_tk=flat(weight),
                valid_tk=flat(valid),
                num_experts=layer.num_experts,
                expected_k=float(layer.top_k),
            )
            return sharded.run(
                options, template.bind(weights), _EXPERT_AXES, x, routing
            )

        y, pull, stats = jax.vjp(forward, weights, x, weight, has_aux=True)
        of_weights, of_x, of_weight = pull(grad)
        results = {OUTPUT: y, f"{OF}x": of_x, COMBINE: of_weight}
        return results | {OF + name: g for name, g in of_weights.items()}, stats

    return run
