"""What passes between the rooms of the MoE layer, and the axis legend.

Axis letters, here and as suffixes of names in `moe/`:

  B batch    S sequence    T tokens (= B * S)    D model width    F expert width
  E experts  e experts of one shard              K experts per token (its maximum)
  C capacity (slots per bucket)                  P slots per expert (continuous)
  L layers   V vocabulary  H heads

Scoring, selection and balancing are written in the global view: under jit a sum over
T is the sum over all tokens of the mesh. Only dispatch and experts run inside
`jax.shard_map`, where T is the number of tokens of one shard.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.tree import struct

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """Static facts of a call.

    Attributes:
      train: training or evaluation (selectors may differ).
      capture: return each layer's `Routing` in `MoEAux.routing`.
    """

    train: bool
    capture: bool = False


TRAIN = Mode(train=True)
EVAL = Mode(train=False)


@struct
class Condition:
    """Under what a token's image is denoised; a token's row is that of its image.

    Attributes:
      time: (T,) float, as the network sees it.
      time_embedding: (T, D) of the time alone.
      embedding: (T, D) of time and class or vector together: what blocks are told.
      label: (T,) int32, the class; the null class is the number of classes. None: the
        model knows no classes.
      none: (T,) bool: the image is denoised without class or vector. None: there is
        always one, or never.
    """

    time: Array
    time_embedding: Array
    embedding: Array
    label: Array | None = None
    none: Array | None = None


@struct(static=("batch_shape",))
class Tokens:
    """A batch of tokens on their way through a router, in the global view.

    Attributes:
      features: (T, D).
      valid: (T,) bool; padding is False and is never routed.
      batch_shape: (B, S) with B * S = T; token t stands at (t // S, t % S).
      token_ids: (T,) int32, for hash routing and per-token analysis.
      positions: (T,) int32, within the document.
      segments: (T,) int32, document of a packed row; 0 is padding.
      modality: (T,) int32.
      queries: (T, H, Dh), the block's, for attention-aware routing.
      keys: (T, H, Dh), likewise.
      condition: pytree of (T, ...) that rides along; from a denoiser a `Condition`.
      own: (T, ...) from the selector's own weights; None: it has none.
    """

    features: Array
    valid: Array
    batch_shape: tuple[int, int]
    token_ids: Array | None = None
    positions: Array | None = None
    segments: Array | None = None
    modality: Array | None = None
    queries: Array | None = None
    keys: Array | None = None
    condition: PyTree = None
    own: Array | None = None


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which tokens compete or mix: blocks of rows x positions of the batch.

    (1, S) is one sequence, (B, S) the whole batch, (n, 1) the same position of n rows.

    Attributes:
      batch_shape: (B, S).
      rows: rows in a group; divides B.
      positions: positions in a group; divides S.
    """

    batch_shape: tuple[int, int]
    rows: int
    positions: int

    @property
    def size(self) -> int:
        """Tokens of a group, N."""
        return self.rows * self.positions

    def split(self, x: Array) -> Array:
        """(T, ...) -> (G, N, ...): N = rows * positions tokens of each group."""
        (b, s), r, p = self.batch_shape, self.rows, self.positions
        blocks = x.reshape(b // r, r, s // p, p, *x.shape[1:]).swapaxes(1, 2)
        return blocks.reshape(b // r * (s // p), r * p, *x.shape[1:])

    def join(self, x: Array) -> Array:
        """The way back: (G, N, ...) -> (T, ...)."""
        (b, s), r, p = self.batch_shape, self.rows, self.positions
        blocks = x.reshape(b // r, s // p, r, p, *x.shape[2:]).swapaxes(1, 2)
        return blocks.reshape(b * s, *x.shape[2:])

    def of_tokens(self) -> Array:
        """(T,) int32, the group of each token."""
        (b, s), r, p = self.batch_shape, self.rows, self.positions
        row, position = jnp.arange(b)[:, None] // r, jnp.arange(s)[None, :] // p
        return (row * (s // p) + position).reshape(-1).astype(jnp.int32)


@struct(static=("num_experts", "expected_k"))
class Routing:
    """Discrete routing: which experts serve which token, with which weight.

    Token choice, expert choice, top-p and global top-K all end here. A dispatch never
    asks which selector made it.

    Attributes:
      expert_tk: (T, K) int32 in [0, E), distinct within a token where valid.
      weight_tk: (T, K) float, what multiplies the expert's output.
      valid_tk: (T, K) bool; an entry that is not valid is not served.
      probs_te: (T, E) float, for the balance losses: non-negative, sums to 1.
      logits_te: (T, E) float, the scorer's output, without noise, for the z-loss.
      choice_te: (T, E) float, what was compared in the selection (with bias, noise
        or group mask), for near-ties and analysis.
      valid_t: (T,) bool; tokens that take part in the statistics.
      num_experts: E.
      expected_k: expected experts per token; sizes buffers (K is only the maximum).
      group_t: (T,) int32, the group within which tokens compete; None: no competition.
      noisy_te: (T, E) float, the logits with the noise of a noisy router, from which
        it selected (in evaluation they are `logits_te`); None: no such noise.
      noise_std: broadcasts to (T, E), the deviation of that noise.
    """

    expert_tk: Array
    weight_tk: Array
    valid_tk: Array
    probs_te: Array
    logits_te: Array
    choice_te: Array
    valid_t: Array
    num_experts: int
    expected_k: float
    group_t: Array | None = None
    noisy_te: Array | None = None
    noise_std: Array | None = None


@struct(static=("num_experts", "expected_k"))
class Assignments:
    """The part of a `Routing` that a dispatch sees: one shard's tokens.

    Attributes:
      expert_tk: (T, K) int32.
      weight_tk: (T, K) float.
      valid_tk: (T, K) bool.
      num_experts: E.
      expected_k: expected experts per token.
    """

    expert_tk: Array
    weight_tk: Array
    valid_tk: Array
    num_experts: int
    expected_k: float


@struct(static=("num_experts", "groups"))
class Mixing:
    """Continuous routing: slots are mixtures of tokens (Soft MoE, Mixture of Tokens).

    Each group g has its own slots: `slot_gep = sum_{t in g} merge_tep * x_t`, and the
    output of its tokens is `y_t = sum_ep emit_tep * f_e(slot_gep)`.

    Attributes:
      merge_tep: (T, E, P) float, zero for padding.
      emit_tep: (T, E, P) float, zero for padding.
      logits_tep: (T, E, P) float.
      valid_t: (T,) bool.
      num_experts: E.
      groups: the tokens that are mixed.
    """

    merge_tep: Array
    emit_tep: Array
    logits_tep: Array
    valid_t: Array
    num_experts: int
    groups: Groups


@struct(static=("top_k",))
class Override:
    """What a caller may impose on a selector.

    Attributes:
      expert_mask: (E,) bool; False experts are pruned.
      logit_shift: (E,) float, added to the logits.
      expert_tk: (T, K) int32, a routing to replay: the choice is taken from here, the
        weights are computed from this run's scores.
      valid_tk: (T, K) bool, of the replayed routing.
      top_k: experts per token in place of the configured ones.
    """

    expert_mask: Array | None = None
    logit_shift: Array | None = None
    expert_tk: Array | None = None
    valid_tk: Array | None = None
    top_k: int | None = None


@struct
class DispatchStats:
    """Exact integers, summed over the mesh; scalars int32.

    Attributes:
      assignments: valid (token, expert) pairs.
      dropped: assignments that no expert served.
      rounds: rounds of exchange (the maximum over the mesh).
      peak_fill: largest bucket, in rows (the maximum over the mesh).
      capacity: rows that a bucket holds in one round; 0: there are no buckets.
      mean_fill: () float32, rows of a bucket in a uniform routing: the capacity is
        `capacity_factor` times this, rounded up. None where there are no buckets.
    """

    assignments: Array
    dropped: Array
    rounds: Array
    peak_fill: Array
    capacity: Array
    mean_fill: Array | None = None


@struct
class Observation:
    """What `router_state` learns from: summed over micro-batches and the mesh.

    Attributes:
      sums: pytree of sums, as the balance method defines them.
      count: () float, tokens that were observed.
    """

    sums: Mapping[str, Array]
    count: Array


@struct
class MoEAux:
    """What a MoE layer says beside its output; stacked on (L,) by the model.

    Attributes:
      losses: name -> () weighted loss, to be added to the objective.
      health: name -> figures for people: expert counts (E,) int32, entropy, ...
      stats: of the dispatch.
      observation: for the update of the router state.
      statistics: name -> sums for losses that pool over layers; see `balance.pooled`.
      routing: the layer's Routing if `Mode.capture`, else None.
      taps: name -> features for auxiliary heads.
    """

    losses: Mapping[str, Array]
    health: Mapping[str, Array]
    stats: DispatchStats
    observation: Observation
    statistics: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    routing: Routing | Mixing | None = None
    taps: Mapping[str, Array] = dataclasses.field(default_factory=dict)


def biased(choice_te: Array, router_state: Mapping[str, Array]) -> Array:
    """What a selector compares, with the bias of loss-free balancing (T, E).

    Wang et al. 2024: "bias" (E,) is added; "factor" (E,), their multiplicative
    variant, is multiplied, which raises a score only where scores are positive.
    """
    constant = jax.lax.stop_gradient
    if "factor" in router_state:
        choice_te = choice_te * constant(router_state["factor"])
    if "bias" in router_state:
        choice_te = choice_te + constant(router_state["bias"])
    return choice_te


def among(routing: Routing, num_experts: int) -> Routing:
    """The part of a routing that concerns the first experts, for their balance.

    A token that another expert serves takes no part in it.
    """
    if num_experts == routing.num_experts:
        return routing
    inside_tk = routing.expert_tk < num_experts
    away_t = jnp.any(routing.valid_tk & ~inside_tk, axis=1)
    first = lambda x_te: x_te[:, :num_experts]
    return dataclasses.replace(
        routing,
        valid_tk=routing.valid_tk & inside_tk,
        probs_te=first(routing.probs_te),
        logits_te=first(routing.logits_te),
        choice_te=first(routing.choice_te),
        valid_t=routing.valid_t & ~away_t,
        num_experts=num_experts,
    )


def counts_per_expert(routing: Routing) -> Array:
    """Assignments per expert over all tokens, (E,) int32 (exact)."""
    experts = jnp.arange(routing.num_experts, dtype=jnp.int32)
    hit_tke = (routing.expert_tk[..., None] == experts) & routing.valid_tk[..., None]
    return jnp.sum(hit_tke, axis=(0, 1), dtype=jnp.int32)
