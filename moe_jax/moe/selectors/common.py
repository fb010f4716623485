"""What the selectors share: scores, overrides, weights, groups of tokens."""

import fractions
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.routing import Array, Groups, Override, Routing, Tokens, biased

ROUNDINGS = ("nearest", "down")

# Below this, log(1 + e^x) is e^x in double precision too.
_LOW = -40.0


def _low_and_rest(x: Array) -> tuple[Array, Array, Array]:
    """Where x is low, x there, x elsewhere: no branch sees what it cannot take."""
    low = x < _LOW
    return low, jnp.where(low, x, _LOW), jnp.where(low, 0.0, x)


def sqrt_softplus(x: Array) -> Array:
    """`sqrt(log(1 + e^x))`; finite derivatives everywhere, 0 at -inf."""
    low, small, rest = _low_and_rest(x)
    return jnp.where(low, jnp.exp(small / 2), jnp.sqrt(jax.nn.softplus(rest)))


def _log_sqrt_softplus(x: Array) -> Array:
    low, small, rest = _low_and_rest(x)
    return jnp.where(low, small, jnp.log(jax.nn.softplus(rest))) / 2


# Name -> the scores (T, E), and logits whose softmax is their share in the sum.
SCORES = {
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), lambda x: x),
    "sigmoid": (jax.nn.sigmoid, jax.nn.log_sigmoid),
    "sqrt_softplus": (sqrt_softplus, _log_sqrt_softplus),
}
# Beside them: the logits themselves, of any sign. They have no share in a sum; the
# probabilities for the losses are those of a softmax.
RAW = {"identity": (lambda x: x, lambda x: x)}


def score_problems(options, path: str, raw: bool = False) -> Iterator[str]:
    """Problems of the field `score`; `raw`: whether it may be the logits."""
    known = [*SCORES, *RAW] if raw else list(SCORES)
    if options.score not in known:
        yield f"{path}.score={options.score!r}: must be one of {known}"


def least_problems(options, path: str, **least: float) -> Iterator[str]:
    """Problems of the fields that must be at least so much."""
    for name, bound in least.items():
        if getattr(options, name) < bound:
            yield f"{path}.{name}={getattr(options, name)}: must be at least {bound}"


def one_expert_problems(options, path: str) -> Iterator[str]:
    """One expert with renormalised weights has weight 1, whatever its score."""
    if options.top_k == 1 and options.renormalize:
        yield (
            f"{path}.top_k=1 with renormalize=True makes every weight 1, so the router "
            "gets no gradient; set renormalize=False"
        )


def group_problems(options, path: str, field: str = "group") -> Iterator[str]:
    value = getattr(options, field)
    if value not in ("sequence", "batch"):
        yield f"{path}.{field}={value!r}: must be 'sequence' or 'batch'"


def capacity_problems(options, path: str, num_experts: int) -> Iterator[str]:
    """Of experts that choose: none takes more tokens than there are."""
    if options.capacity_factor > num_experts:
        yield (
            f"{path}.capacity_factor={options.capacity_factor}: an expert would take "
            f"more tokens than there are; at most the {num_experts} experts"
        )


def groups(options, tokens: Tokens) -> Groups:
    """The tokens that compete, by the field `group`."""
    rows, positions = tokens.batch_shape
    return Groups(
        tokens.batch_shape, rows if options.group == "batch" else 1, positions
    )


def portion(size: Array, factor: float, num_experts: int, rounding: str) -> Array:
    """`size * factor / num_experts`, at least 1 and at most `size`; in integers.

    Args:
      size: int32.
      factor: capacity factor, of which the nearest fraction over at most 100 is taken.
      num_experts: E.
      rounding: "nearest" (a half goes up) or "down".
    """
    share = fractions.Fraction(factor).limit_denominator(100) / num_experts
    # Doubled, so that a half is whole; the quotient is taken apart, so that no product
    # overflows.
    above, below = 2 * share.numerator, 2 * share.denominator
    half = share.denominator if rounding == "nearest" else 0
    whole, rest = jnp.divmod(size, below)
    return (whole * above + (rest * above + half) // below).clip(1, size)


def rounding_problems(options, path: str) -> Iterator[str]:
    if options.rounding not in ROUNDINGS:
        yield f"{path}.rounding={options.rounding!r}: must be one of {ROUNDINGS}"


def take_best(
    choice_te: Array, tokens: Tokens, groups: Groups, number: Callable[[Array], Array]
) -> Array:
    """Expert choice, (T, E) bool: whether a token is among the best of its group.

    Args:
      choice_te: (T, E), what is compared; -inf is never taken.
      tokens: padding is never taken.
      groups: of the tokens.
      number: valid tokens of the groups (G,) int32 to how many an expert takes, (G,)
        or (G, E).
    """
    choice_te = jnp.where(tokens.valid[:, None], choice_te, -jnp.inf)
    choice_gne = groups.split(choice_te)
    size_g = jnp.sum(groups.split(tokens.valid), axis=1, dtype=jnp.int32)
    taken = number(size_g)
    taken_ge = taken if taken.ndim == 2 else taken[:, None]
    chosen_gne = ranks(choice_gne, axis=1) < taken_ge[:, None]
    return groups.join(chosen_gne & ~jnp.isneginf(choice_gne))


def refuse(override: Override | None, selector: str, **reasons: str) -> None:
    """Raises ValueError for the fields of an override that a selector cannot take."""
    for name, reason in reasons.items():
        if override is not None and getattr(override, name) is not None:
            raise ValueError(f"{selector} takes no override of {name}: {reason}")


def replays(override: Override | None) -> bool:
    return override is not None and override.expert_tk is not None


def adjusted(logits_te: Array, override: Override | None) -> Array:
    """The logits with the override's shift, -inf for pruned experts."""
    if override is not None and override.logit_shift is not None:
        logits_te = logits_te + override.logit_shift
    return pruned(logits_te, override)


def pruned(values_te: Array, override: Override | None) -> Array:
    if override is None or override.expert_mask is None:
        return values_te
    return jnp.where(override.expert_mask, values_te, -jnp.inf)


def scores_and_probs(score: str, logits_te: Array) -> tuple[Array, Array]:
    """The scores (T, E), and what they are divided by their sum, for the losses."""
    value, logs = (SCORES | RAW)[score]
    scores_te = value(logits_te)
    if score == "softmax":
        return scores_te, scores_te
    # Not scores / sum: where all scores underflow, that is 0 / 0.
    return scores_te, jax.nn.softmax(logs(logits_te), axis=-1)


def compared(
    values_te: Array, router_state: Mapping[str, Array], override: Override | None
) -> Array:
    """What is compared: constants, with the router state's bias (Wang et al. 2024).

    Pruned experts are taken out last: a bias would lift a probability of zero.
    """
    choice_te = biased(values_te, router_state)
    return pruned(jax.lax.stop_gradient(choice_te), override)


def best(
    choice_te: Array, top_k: int, override: Override | None
) -> tuple[Array, Array]:
    """The K best experts (T, K), or those of a replay, and which count (T, K) bool.

    Ties go to the lowest index. What has -inf counts only where a replay says so, and
    a pruned expert never.
    """
    if replays(override):
        return replayed(override)
    value_tk, expert_tk = jax.lax.top_k(choice_te, top_k)
    # A NaN has to reach the loss, and where top_k puts it differs between platforms.
    lost_t = jnp.any(jnp.isnan(choice_te), axis=-1, keepdims=True)
    return expert_tk.astype(jnp.int32), ~jnp.isneginf(value_tk) | lost_t


def replayed(override: Override) -> tuple[Array, Array]:
    """Experts and validity of a replay, without those that are pruned."""
    expert_tk, valid_tk = override.expert_tk, override.valid_tk
    if valid_tk is None:
        raise ValueError("a replayed expert_tk needs its valid_tk")
    if override.expert_mask is not None:
        valid_tk = valid_tk & jnp.take(override.expert_mask, expert_tk)
    return expert_tk, valid_tk


def number(options, override: Override | None) -> int:
    """K: the override's or the configured one."""
    if override is not None and override.top_k is not None:
        return override.top_k
    return options.top_k


def gather(values_te: Array, expert_tk: Array) -> Array:
    return jnp.take_along_axis(values_te, expert_tk, axis=-1)


def weights(
    options, logits_te: Array, scores_te: Array, expert_tk: Array, served_tk: Array
) -> Array:
    """The weights (T, K) by the fields `renormalize`, `score` and `scale`.

    Args:
      options: of a selector.
      logits_te: (T, E).
      scores_te: (T, E), taken as they are where weights are not renormalised.
      expert_tk: (T, K).
      served_tk: (T, K) bool; the others get 0, and no share.
    """
    if options.renormalize:
        weight_tk = shares(options.score, logits_te, expert_tk, served_tk)
    else:
        weight_tk = jnp.where(served_tk, gather(scores_te, expert_tk), 0)
    return weight_tk * options.scale


def shares(score: str, logits_te: Array, expert_tk: Array, served_tk: Array) -> Array:
    """The scores of the served experts over their sum, (T, K).

    By logarithms, so that no sum of scores that underflow divides; DeepSeek adds 1e-20
    to the sum.
    """
    logs_tk = SCORES[score][1](gather(logits_te, expert_tk))
    # A finite stand-in for -inf: where nobody serves, there must be no NaN.
    served_tk = served_tk & ~jnp.isneginf(logs_tk)
    logs_tk = jnp.where(served_tk, logs_tk, jnp.finfo(logs_tk.dtype).min / 2)
    return jnp.where(served_tk, jax.nn.softmax(logs_tk, axis=-1), 0)


def served(routing: Routing) -> Array:
    """(T, E) bool: which experts serve which tokens."""
    experts = jnp.arange(routing.num_experts, dtype=jnp.int32)
    hit_tke = (routing.expert_tk[..., None] == experts) & routing.valid_tk[..., None]
    return jnp.any(hit_tke, axis=1)


def ranks(values: Array, axis: int) -> Array:
    """Places along an axis, 0 for the largest; of equal ones the first wins."""
    order = jnp.argsort(-values, axis=axis, stable=True)
    return jnp.argsort(order, axis=axis)


def refuse_choices(override: Override | None, selector: str) -> None:
    """A continuous selector chooses nothing: no other K, no replay."""
    reason = "it mixes, and chooses nothing"
    refuse(override, selector, top_k=reason, expert_tk=reason, valid_tk=reason)


def softmax_over_group(values: Array, valid_t: Array, groups: Groups) -> Array:
    """Softmax over the valid tokens of each group, (T, ...); padding gets 0."""
    valid = valid_t.reshape(-1, *(1,) * (values.ndim - 1))
    # A finite stand-in for -inf: a group of padding alone must not give NaN.
    values = jnp.where(valid, values, jnp.finfo(values.dtype).min / 2)
    weights = groups.join(jax.nn.softmax(groups.split(values), axis=1))
    return jnp.where(valid, weights, 0)
