"""What every model family offers to objectives, the step, and generation."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from moe_jax.moe.routing import Mode, MoEAux, Observation, Override
from moe_jax.nn.module import Params
from moe_jax.parallel.rules import Axes
from moe_jax.tree import struct

RouterState = dict[str, Any]


@struct
class TokenInputs:
    """A batch of packed text.

    Attributes:
      tokens: (B, S) int32.
      positions: (B, S) int32, restart at 0 with each document.
      segments: (B, S) int32, document of the row; 0 is padding.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array


@struct
class ImageInputs:
    """A batch of noisy images.

    Attributes:
      x: (B, H, W, C), pixels or latents.
      time: (B,) float, in the unit in which the network sees it.
      label: (B,) int32 classes, the null class is their number; or (B, W) vectors; None
        for a model without a condition.
      none: (B,) bool: the image has no class or vector, as if it was the null class.
        None: all have.
      valid: (B,) bool; an image that is False only fills the batch and is not routed.
        None: all are.
    """

    x: jax.Array
    time: jax.Array
    label: jax.Array | None = None
    none: jax.Array | None = None
    valid: jax.Array | None = None


@struct
class ImageOutput:
    """What a model of images says.

    Attributes:
      prediction: (B, H, W, C_out), float32 or wider.
      log_variance: (B,) float, of the loss at the time, learned; or None.
      losses: name -> () weighted loss of the model's own, a mean over the batch; beside
        those of `aux`.
      observations: like the router state.
      aux: stacked on the MoE layers, or None.
    """

    prediction: jax.Array
    log_variance: jax.Array | None
    losses: Mapping[str, jax.Array]
    observations: dict[str, Any]
    aux: MoEAux | None


class Output(NamedTuple):
    """What is multiplied to get logits.

    Attributes:
      hidden: (B, S, D), normed.
      matrix: (D, V) or (V, D), as parameters lie.
      axes: its logical axes, ("embed", "vocab") or the reverse.
      bias: (V,), added to the product; or None.
      softcap: c of `c tanh(logit / c)`, applied last; 0: none.
    """

    hidden: jax.Array
    matrix: jax.Array
    axes: Axes
    bias: jax.Array | None = None
    softcap: float = 0.0


class RoutedModel(Protocol):
    """A model is code and static facts; weights are passed in.

    Attributes:
      axes: tree of logical axes, like the parameters.
      rounded: tree of bools, like the parameters: whether a weight's gradient has no
        more digits than the computation's type (`nn.module.param`).
      whole: tree of bools, like the parameters: whether the code takes a
        `parallel.whole.Whole` in a weight's place.
      dtype: of the computation.
      needs_step_load: a loss takes the experts' load from the whole optimizer step;
        where that is accumulated, it is observed in a first pass.
      expert_axes: mesh axes over which experts are split; () without experts.
    """

    axes: Params
    rounded: Params
    whole: Params
    dtype: str
    needs_step_load: bool
    expert_axes: tuple[str, ...]

    def notes(self, rows: int, length: int) -> list[str]:
        """Lines about what was chosen for B x S tokens under the current mesh."""

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of arrays."""

    def init_router_state(self) -> RouterState:
        """What routers learn without gradients, a nested dict of arrays."""

    def update_router_state(
        self, state: RouterState, observations: dict[str, Any]
    ) -> RouterState:
        """The state after an optimizer step."""

    def with_step_load(
        self, state: RouterState, observations: dict[str, Any]
    ) -> RouterState:
        """The state with what a whole step observed, for the losses of its parts."""

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that take part in serving one token."""

    def flops_per_row(self, length: int) -> float:
        """Model FLOPs of a training step per row of `length` positions.

        Forward and backward; a row is a sequence of text, or an image.
        """


class Model(RoutedModel, Protocol):
    """A model of tokens.

    Attributes:
      depths_ahead: how many further tokens `ahead` predicts; 0: none.
    """

    depths_ahead: int

    def apply(
        self,
        params: Params,
        router_state: RouterState,
        inputs: Any,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None = None,
    ) -> tuple[jax.Array, dict[str, Observation], MoEAux | None]:
        """Hidden states, observations like the router state, MoE aux over L."""

    def ahead(
        self,
        params: Params,
        router_state: RouterState,
        inputs: Any,
        normed: jax.Array,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None = None,
    ) -> tuple[list[jax.Array], dict[str, Observation], MoEAux | None]:
        """For each depth hidden states as in `Output`, then what `apply` returns.

        `normed` is `Output.hidden`. Arrays of `override` are stacked on the MoE layers
        of `apply` and then those of the depths.
        """

    def output(self, params: Params, hidden: jax.Array) -> Output:
        """Hidden states to the factors of the logits, for a loss over many tokens."""

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Hidden states to the model's outputs, (B, S, V): for few tokens."""


class ImageModel(RoutedModel, Protocol):
    """A model of noisy images."""

    def apply(
        self,
        params: Params,
        router_state: RouterState,
        inputs: ImageInputs,
        *,
        key: jax.Array | None,
        mode: Mode,
        override: Override | None = None,
    ) -> ImageOutput:
        """The prediction, and what the routers have to say.

        In training a key is needed where conditions are perturbed.
        """
