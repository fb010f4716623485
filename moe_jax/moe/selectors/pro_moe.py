"""ProMoE (Wei et al. 2025): images without condition have an expert of their own.

The last expert is that one, "unconditional"; the others are routed. A token of an image
that is denoised without a condition (`Condition.none`) goes to the last expert with
weight 1, and to no other. For all other tokens the routed experts have scores: cosines
with the experts' prototypes. A contrastive loss draws each prototype to the mean of the
tokens that its expert serves, and away from the means of the others.

Balance, losses of `Balance` included, is that of the routed experts and the tokens that
they may serve; `health` counts the last expert too.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Groups, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


class _Contrastive(config.SelectorConfig):
    """What both configs share."""

    __slots__ = ()

    def num_routed(self, num_experts):
        return num_experts - 1

    def problems(self, path, root):
        yield from common.score_problems(self, path, raw=True)
        if self.contrastive_weight < 0:
            yield (
                f"{path}.contrastive_weight={self.contrastive_weight}: must not be "
                "negative"
            )
        if self.tau <= 0:
            yield f"{path}.tau={self.tau}: must be positive"

    def size_problems(self, path, num_experts):
        moe, name = path.rpartition(".")[0], type(self).__name__
        if num_experts < 2:
            yield (
                f"{moe}.num_experts={num_experts}: {name} needs at least 2, a routed "
                "expert and the last one, which takes images without condition"
            )


@config.node
class ProMoE(_Contrastive):
    """Each token takes the K routed experts of the highest scores, its weights.

    Attributes:
      top_k: experts per token, K.
      score: of the cosines: "identity", "sigmoid", "softmax" or "sqrt_softplus".
      contrastive_weight: of the contrastive loss.
      tau: its temperature.
    """

    top_k: int = 1
    score: str = "identity"
    contrastive_weight: float = 1.0
    tau: float = 0.07

    def problems(self, path, root):
        yield from common.least_problems(self, path, top_k=1)
        yield from _Contrastive.problems(self, path, root)

    def size_problems(self, path, num_experts):
        yield from _Contrastive.size_problems(self, path, num_experts)
        if num_experts >= 2 and self.top_k > num_experts - 1:
            yield (
                f"{path}.top_k={self.top_k} is more than the {num_experts - 1} routed "
                f"experts of {path.rpartition('.')[0]}.num_experts={num_experts}"
            )


@config.node
class ProMoEChoice(_Contrastive):
    """Each routed expert takes its best tokens of an image.

    Attributes:
      capacity_factor: routed experts per token on average, c; each takes c * N / E' of
        the N tokens of an image, E' routed experts, rounded down, at least one.
      score: as of `ProMoE`.
      contrastive_weight: of the contrastive loss.
      tau: its temperature.
    """

    capacity_factor: float = 1.0
    score: str = "identity"
    contrastive_weight: float = 1.0
    tau: float = 0.07

    def experts_per_token(self, num_experts, sequence_length=0):
        return self.capacity_factor

    def problems(self, path, root):
        yield from _Contrastive.problems(self, path, root)
        if self.capacity_factor <= 0:
            yield f"{path}.capacity_factor={self.capacity_factor}: must be positive"

    def size_problems(self, path, num_experts):
        yield from _Contrastive.size_problems(self, path, num_experts)
        yield from common.capacity_problems(self, path, max(1, num_experts - 1))


def without_condition(tokens: Tokens) -> Array:
    """(T,) bool: tokens of images that are denoised without a condition.

    Raises:
      ValueError: tokens that know no condition at all.
    """
    if tokens.condition is None:
        raise ValueError("ProMoE needs tokens with a routing.Condition, and got none")
    none_t = tokens.condition.none
    return jnp.zeros(tokens.valid.shape, bool) if none_t is None else none_t


def _of_routed(override: Override | None) -> Override | None:
    """The part of an override that the scores of the routed experts take."""
    if override is None:
        return None
    cut = lambda x_e: None if x_e is None else x_e[:-1]
    return Override(
        expert_mask=cut(override.expert_mask), logit_shift=cut(override.logit_shift)
    )


def _routing(
    logits_te, tokens, router_state, override, options, choose, expected_k
) -> Routing:
    """What both selectors share.

    Args:
      logits_te: (T, E - 1).
      tokens: with their condition.
      router_state: see `routing.biased`.
      override: of the whole layer.
      options: with `score`.
      choose: what is compared (T, E - 1), and tokens without condition (T,), to experts
        (T, K) and whether they serve.
      expected_k: of the routed experts.
    """
    none_t, routed = without_condition(tokens), _of_routed(override)
    logits_te = common.adjusted(logits_te, routed)
    scores_te, probs_te = common.scores_and_probs(options.score, logits_te)
    choice_te = common.compared(scores_te, router_state, routed)
    last = logits_te.shape[-1]
    if common.replays(override):
        expert_tk, valid_tk = common.replayed(override)
    else:
        expert_tk, valid_tk = choose(choice_te, none_t)
        if override is not None and override.expert_mask is not None:
            valid_tk = valid_tk & jnp.take(override.expert_mask, expert_tk)
    with_last = lambda x_te, value: jnp.pad(
        x_te, [(0, 0), (0, 1)], constant_values=value
    )
    weight_tk = common.gather(with_last(scores_te, 1), expert_tk)
    # The last expert is the only one of its tokens, and no candidate of the others.
    most_t = jnp.max(logits_te, axis=-1)
    own_te = jnp.arange(last + 1) == last
    of_last_t = jnp.where(none_t, most_t, -jnp.inf)
    return Routing(
        expert_tk=expert_tk,
        # The logit of a pruned expert is -inf.
        weight_tk=jnp.where(jnp.isneginf(weight_tk), 0, weight_tk),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=jnp.where(none_t[:, None], own_te, with_last(probs_te, 0)),
        logits_te=jnp.concatenate([logits_te, of_last_t[:, None]], axis=-1),
        choice_te=with_last(choice_te, -jnp.inf),
        valid_t=tokens.valid,
        num_experts=last + 1,
        expected_k=expected_k,
    )


def select(
    options: ProMoE,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to its K best routed experts, or to the last expert.

    A bias in the router state moves the choice only. Every override is honoured.

    Args:
      options: the config.
      logits_te: (T, E - 1), cosines of the routed experts.
      tokens: with a `Condition`.
      router_state: see `routing.biased`; of the routed experts.
      mode: training and evaluation do not differ.
      override: over all E experts.
      key: not used; the choice is deterministic.

    Returns:
      Routing with K = `top_k`; the last expert stands in the first slot.

    Raises:
      ValueError: tokens without a `Condition`.
    """
    top_k = common.number(options, override)

    def choose(choice_te, none_t):
        expert_tk, valid_tk = common.best(choice_te, top_k, None)
        first_k = jnp.arange(top_k) == 0
        last = choice_te.shape[-1]
        expert_tk = jnp.where(none_t[:, None] & first_k, last, expert_tk)
        return expert_tk, jnp.where(none_t[:, None], first_k, valid_tk)

    return _routing(
        logits_te, tokens, router_state, override, options, choose, float(top_k)
    )


def select_choice(
    options: ProMoEChoice,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes to each routed expert its best tokens of each image.

    An image without condition goes to the last expert. See `select`; of an override,
    another K is refused.

    Returns:
      Routing with K = E: slot k is expert k.
    """
    common.refuse(override, "ProMoEChoice", top_k="experts choose; see capacity_factor")
    share = options.capacity_factor, logits_te.shape[-1], "down"

    def choose(choice_te, none_t):
        takes = Groups(tokens.batch_shape, 1, tokens.batch_shape[1])
        choice_te = jnp.where(none_t[:, None], -jnp.inf, choice_te)
        number = lambda size_g: common.portion(size_g, *share)
        taken_te = common.take_best(choice_te, tokens, takes, number)
        valid_tk = jnp.concatenate([taken_te, none_t[:, None]], axis=-1)
        experts = jnp.arange(valid_tk.shape[-1], dtype=jnp.int32)
        return jnp.broadcast_to(experts, valid_tk.shape), valid_tk

    return _routing(
        logits_te, tokens, {}, override, options, choose, options.capacity_factor
    )


def losses(
    options: ProMoE | ProMoEChoice, routing: Routing, tokens: Tokens, scorer: object
) -> dict[str, Array]:
    """The weighted contrastive loss: over the batch, or the mean over images.

    Args:
      options: the config.
      routing: over all tokens at hand.
      tokens: that were routed.
      scorer: a `CosineScorer`.
    """
    if not options.contrastive_weight:
        return {}
    rows, positions = tokens.batch_shape
    rows = 1 if isinstance(options, ProMoEChoice) else rows
    groups = Groups(tokens.batch_shape, rows, positions)
    value = contrastive(routing, tokens.features, scorer.cosines, groups, options.tau)
    return {"contrastive_loss": options.contrastive_weight * value}


def contrastive(routing, features_td, cosines, groups, tau) -> Array:
    """`-mean_e log softmax_j(cos(p_e, m_j) / tau)_e`, (), a mean over groups.

    m_j is the mean of the group's tokens that routed expert j serves, p_e the prototype
    of expert e; both run over the experts that serve any. A group of fewer than two
    such experts does not count. The gradient reaches prototypes and features.

    Args:
      routing: the last expert is not routed.
      features_td: (T, D).
      cosines: (..., D) to (..., E - 1), with the prototypes.
      groups: of the tokens.
      tau: temperature.
    """
    served_gne = groups.split(common.served(routing)[:, :-1])
    wide = jnp.promote_types(features_td.dtype, jnp.float32)
    x_gnd = groups.split(features_td.astype(wide))
    count_ge = jnp.sum(served_gne, axis=1, dtype=jnp.int32)
    sum_ged = jnp.einsum(
        "gne,gnd->ged",
        served_gne.astype(wide),
        x_gnd,
        precision=jax.lax.Precision.HIGHEST,
    )
    active_ge = count_ge > 0
    mean_ged = sum_ged / jnp.maximum(count_ge, 1).astype(wide)[..., None]
    # [g, j, e]: mean j with prototype e.
    z_gje = cosines(mean_ged) / tau
    z_gje = jnp.where(active_ge[..., None], z_gje, jnp.finfo(z_gje.dtype).min / 2)
    logs_gje = jax.nn.log_softmax(z_gje, axis=1)
    own_ge = jnp.diagonal(logs_gje, axis1=1, axis2=2)
    active_g = jnp.sum(active_ge, axis=1)
    total_g = -jnp.sum(jnp.where(active_ge, own_ge, 0), axis=1)
    counts_g = active_g >= 2
    loss_g = jnp.where(counts_g, total_g / jnp.maximum(active_g, 1), 0)
    return jnp.sum(loss_g) / jnp.maximum(jnp.sum(counts_g), 1)
