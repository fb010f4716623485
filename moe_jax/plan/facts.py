"""What the cost of a step follows from: weights, state and a mesh, all without arrays.

Shapes come from `jax.eval_shape` once a model, places from the trainer's own rules, so
the bytes of parameters and optimizer state are exact.
"""

import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from moe_jax import config_json, models
from moe_jax.config import AttentionConfig, Config, DispatchConfig
from moe_jax.errors import UserError
from moe_jax.models import remat
from moe_jax.models.decoder import Decoder
from moe_jax.moe.dispatch import auto, plan, ragged
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.dispatch.ring import Ring
from moe_jax.moe.layer import MoE
from moe_jax.nn import attention, cross_entropy, module
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import AXES
from moe_jax.train import optimizers, state
from moe_jax.tree import named_leaves

# The parts of a decoder by a piece of a weight's path; what is left is feed-forward.
_PARTS = (
    ("/attention/", "attention"),
    ("/scorer/", "router"),
    ("/experts/", "experts"),
    ("embedding", "embedding"),
    ("output", "logits"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight matrix, stacked over layers; norms' scales are none.

    Attributes:
      part: "attention", "router", "experts", "feed-forward", "embedding", "logits".
      block: "segment_0/block_0", or "" outside of the blocks.
      size: entries, of all layers and experts.
      layers: how many are stacked.
      axes: logical axes of the dimensions.
      trained: False where an optimizer group freezes it.
    """

    part: str
    block: str
    size: int
    layers: int
    axes: rules.Axes
    trained: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """An array of the train state.

    Attributes:
      kind: "parameters" or "optimizer" (with the average, the router's state).
      shape: global.
      itemsize: bytes of an entry.
      gradient_itemsize: of an entry of its gradient; 0 where there is none.
      split: mesh axes of each dimension.
    """

    kind: str
    shape: tuple[int, ...]
    itemsize: int
    gradient_itemsize: int
    split: tuple[tuple[str, ...], ...]

    def local_bytes(self, sizes: dict[str, int]) -> int:
        """Bytes on one device of a mesh with these axis sizes."""
        parts = (math.prod(sizes[a] for a in axes) for axes in self.split)
        dims = (-(-dim // n) for dim, n in zip(self.shape, parts, strict=True))
        return math.prod(dims) * self.itemsize

    def gradient_bytes(self, sizes: dict[str, int]) -> int:
        """Of its gradient, on one device."""
        return self.local_bytes(sizes) * self.gradient_itemsize // self.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What does not depend on mesh, dispatch, recomputation and micro-batches.

    Attributes:
      weights: matrices.
      leaves: of the train state.
      flops_per_token: of the model, forward and backward.
    """

    weights: tuple[Weight, ...]
    leaves: tuple[Leaf, ...]
    flops_per_token: float


def of_config(config: Config) -> Facts:
    """The facts of a config; cached.

    Raises:
      UserError: the model is of a family whose cost is not known here.
    """
    if not isinstance(config.model, Decoder):
        raise UserError(
            f"config.model={type(config.model).__name__}: the analytic model knows "
            "Decoder only; --search cannot rank its layouts"
        )
    plain = copy.deepcopy(config)
    plain.model.remat = "none"
    plain.model.attention = attention.auto.Auto()
    fresh = Config(
        model=plain.model,
        data=dataclasses.replace(plain.data, source=None, tokenizer=None),
        objective=plain.objective,
        optimizer=plain.optimizer,
    )
    fresh.train.ema_decay = config.train.ema_decay
    if isinstance(plain.model.feed_forward, MoE):
        plain.model.feed_forward.dispatch = MoE().dispatch
    return _of_json(config_json.to_json(fresh))


@functools.lru_cache(maxsize=16)
def _of_json(text: str) -> Facts:
    config = config_json.from_json(text)
    model = models.build(config.model)
    optimizer = optimizers.make_optimizer(config.optimizer, lambda step: 1.0)
    make = lambda key: state.init_state(config, model, optimizer, key)
    shapes = jax.eval_shape(make, jax.eval_shape(jax.random.key, 0))
    anywhere = jax.sharding.AbstractMesh((1,) * len(AXES), AXES)
    places = state.state_shardings(shapes, model.axes, anywhere)
    slots = lambda params: module.slots(params, model.rounded, model.dtype)
    gradients = named_leaves({"params": jax.eval_shape(slots, shapes.params)})
    leaves = tuple(
        _leaf(name, leaf, place.spec, gradients.get(name))
        for (name, leaf), place in zip(
            named_leaves(shapes).items(), jax.tree.leaves(places), strict=True
        )
    )
    axes = jax.tree_util.tree_flatten_with_path(
        model.axes, is_leaf=lambda v: isinstance(v, tuple)
    )[0]
    by_name = {state.path_name(path): value for path, value in axes}
    weights = tuple(
        _weight(name, leaf.shape, by_name[name], trained)
        for tree, trained in ((shapes.params, True), (shapes.frozen, False))
        for name, leaf in named_leaves(tree).items()
        if not name.endswith("/scale")
    )
    return Facts(
        weights=weights,
        leaves=leaves,
        flops_per_token=model.flops_per_token(config.data.sequence_length),
    )


def _leaf(name, leaf, spec, gradient) -> Leaf:
    entries = (*spec, *(None,) * (leaf.ndim - len(spec)))
    return Leaf(
        kind="parameters" if name.startswith(("params", "frozen")) else "optimizer",
        shape=leaf.shape,
        itemsize=jnp.dtype(leaf.dtype).itemsize,
        gradient_itemsize=0 if gradient is None else gradient.dtype.itemsize,
        split=tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries),
    )


def _weight(name, shape, axes, trained) -> Weight:
    parts = (part for piece, part in _PARTS if piece in name)
    block = "/".join(name.split("/")[:2]) if name.startswith("segment_") else ""
    return Weight(
        part=next(parts, "feed-forward"),
        block=block,
        size=math.prod(shape),
        layers=shape[0] if block else 1,
        axes=axes,
        trained=trained,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A config on a mesh, seen from one device and one micro-batch.

    Attributes:
      model: the decoder.
      moe: its feed-forward, None where it is dense.
      sizes: of the mesh axes.
      slices: that the data axis spans.
      micro_batches: per step.
      gathers_once: weights are gathered per step, not per use.
      rows: texts.
      length: tokens of a text, whole.
      tokens: of this device.
      served: rows that its experts compute, times experts.
      sent: rows that it puts into the exchange.
      chunk: tokens whose logits are there at once.
      width: bytes of a number in the computation.
      attention: resolved.
      dispatch: of the experts, resolved.
    """

    model: Decoder
    moe: MoE | None
    sizes: dict[str, int]
    slices: int
    micro_batches: int
    gathers_once: bool
    rows: float
    length: int
    tokens: float
    served: float
    sent: float
    chunk: float
    width: int
    attention: AttentionConfig
    dispatch: DispatchConfig | None

    def ways(self, *axes: str) -> int:
        """Devices over the mesh axes or those of a logical axis."""
        names = (rules.RULES.get(axis, (axis,)) for axis in axes)
        return math.prod(self.sizes[n] for group in names for n in group)

    def keeps(self, name: str) -> bool:
        """Whether a rematerialised block keeps what has this name."""
        return name in remat.names_of(self.model.remat)

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass makes a block's activations again."""
        return self.model.remat not in ("none", "dots")

    @property
    def exchanges_again(self) -> bool:
        """Whether it exchanges the experts' rows again for that."""
        return self.model.remat != "none" and not self.keeps("exchanges")

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def moe_layers(self) -> int:
        if self.moe is None:
            return 0
        return (self.model.num_layers - self.moe.first_dense) // self.moe.every


def resolve(
    dispatch: DispatchConfig, shards: int, tokens: int, top_k: float, experts: int
) -> DispatchConfig:
    """What `Auto` becomes on a TPU; every other dispatch as it is."""
    if isinstance(dispatch, Auto):
        return auto.choose("tpu", shards, tokens, top_k, experts)
    return dispatch


def bucket_rows(
    dispatch: DispatchConfig, shards: int, tokens: int, top_k: float, experts: int
) -> tuple[float, float]:
    """Rows computed and rows exchanged by a shard with this many tokens.

    A dispatch that is not known here is taken to compute what was assigned.

    Args:
      dispatch: resolved.
      shards: over which the experts are split.
      tokens: of one shard.
      top_k: K.
      experts: E.
    """
    mean = tokens * top_k / experts
    if isinstance(dispatch, DenseDispatch):
        return tokens * experts, 0
    if isinstance(dispatch, Bucket | Exact):
        rows = experts * plan.bucket_rows(mean, dispatch.capacity_factor, tokens)
        return rows, rows
    if isinstance(dispatch, Einsum):
        size = min(dispatch.group_size, tokens)
        mean = size * top_k / experts
        one = plan.bucket_rows(mean, dispatch.capacity_factor, size)
        rows = -(-tokens // size) * experts * one
        return rows, rows
    if isinstance(dispatch, Gather | Ring):
        return tokens * top_k, tokens * shards
    if isinstance(dispatch, Ragged):
        return tokens * top_k, tokens * ragged.destinations(top_k, experts, shards)
    return tokens * top_k, tokens * top_k


def layout_of(config: Config, sizes: dict[str, int], slices: int = 1) -> Layout:
    """The layout of a legal config; `sizes` without -1."""
    model, length = config.model, config.data.sequence_length
    batch = math.prod(sizes[axis] for axis in rules.RULES["batch"])
    rows = config.train.batch_size / config.train.accumulation / batch
    tokens = rows * length / sizes["context"]
    moe = model.feed_forward if isinstance(model.feed_forward, MoE) else None
    served = sent = 0.0
    dispatch = None
    if moe is not None:
        top_k = moe.selector.experts_per_token(moe.num_experts, length)
        numbers = (sizes["expert"], int(tokens), top_k, moe.num_experts)
        dispatch = resolve(moe.dispatch, *numbers)
        served, sent = bucket_rows(dispatch, *numbers)
    chunk = getattr(config.objective, "logit_chunk", 0)
    chunk = chunk or cross_entropy.chunk_of(
        model.d_model, model.vocab_size // sizes["tensor"]
    )
    call = model.attention_calls(length, sizes["context"])[-1]
    return Layout(
        model=model,
        moe=moe,
        attention=attention.auto.resolve(model.attention, "tpu", call),
        dispatch=dispatch,
        sizes=sizes,
        slices=slices,
        micro_batches=config.train.accumulation,
        gathers_once=config.train.gather_once,
        rows=rows,
        length=length,
        tokens=tokens,
        served=served,
        sent=sent,
        chunk=min(tokens, chunk),
        width=jnp.dtype(model.dtype).itemsize,
    )
