"""What the selectors share: scores, overrides, weights, groups of tokens."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.routing import Array, Groups, Override, Tokens, biased

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


def score_problems(options, path: str) -> Iterator[str]:
    if options.score not in SCORES:
        yield f"{path}.score={options.score!r}: must be one of {list(SCORES)}"


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


def group_problems(options, path: str) -> Iterator[str]:
    if options.group not in ("sequence", "batch"):
        yield f"{path}.group={options.group!r}: must be 'sequence' or 'batch'"


def groups(options, tokens: Tokens) -> Groups:
    """The tokens that compete, by the field `group`."""
    rows, positions = tokens.batch_shape
    return Groups(
        tokens.batch_shape, rows if options.group == "batch" else 1, positions
    )


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
    value, logs = SCORES[score]
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
