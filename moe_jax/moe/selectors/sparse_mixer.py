"""SparseMixer (Liu et al. 2023): a sampled expert, and the sample's gradient."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common


@config.node
class SparseMixer(config.SelectorConfig):
    """One expert, sampled in training, with the midpoint estimate of the gradient.

    The paper's factor on the output is `output_scale=True` of the MoE layer.

    Attributes:
      eps: experts whose logit is relatively more than 2 eps below the largest are out.
    """

    eps: float = 0.1

    def experts_per_token(self, num_experts, sequence_length=0):
        return 1.0

    def problems(self, path, root):
        yield from common.least_problems(self, path, eps=0)


def masked(logits_te: Array, eps: float) -> Array:
    """The logits, -inf where `(max - z_e) / max(|z_e|, max) > 2 eps`.

    The largest one stays, and with eps = 0 only those that equal it.
    """
    top_t = jnp.max(logits_te, axis=-1, keepdims=True)
    size_te = jnp.maximum(jnp.abs(logits_te), top_t)
    # With 0 * inf for a pruned expert the comparison is False, and it stays -inf.
    far_te = top_t - logits_te > 2 * eps * size_te
    return jnp.where(jax.lax.stop_gradient(far_te), -jnp.inf, logits_te)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiplier(gate_t: Array, factor_t: Array, slope: float) -> Array:
    """`gate * factor`, whose derivative by the gate is `slope` whatever the factor."""
    return gate_t * factor_t


def _forward(gate_t, factor_t, slope):
    return gate_t * factor_t, None


def _reverse(slope, saved, grad_t):
    return slope * grad_t, None


multiplier.defvjp(_forward, _reverse)


def drawn(
    masked_te: Array, chosen_t: Array | None, mode: Mode, key: Array | None
) -> tuple[Array, Array, Array]:
    """The expert of each token: sampled in training, the best in evaluation.

    Args:
      masked_te: (T, E) logits; the sample follows their softmax.
      chosen_t: (T,) int32, a choice to replay, or None.
      mode: training or evaluation.
      key: of the Gumbel noise and of the uniform number.

    Returns:
      The expert (T,) int32, what was compared (T, E), and a uniform number (T,), which
      is 0 where the expert is the best one: then no estimate is taken further in.
    """
    best_t = jnp.argmax(masked_te, axis=-1).astype(jnp.int32)
    if not mode.train:
        chosen_t = best_t if chosen_t is None else chosen_t
        return chosen_t, masked_te, jnp.zeros(best_t.shape, masked_te.dtype)
    if key is None:
        raise ValueError("SparseMixer samples in training: pass a key to the layer")
    noise_key, uniform_key = jax.random.split(key)
    noise_te = jax.random.gumbel(noise_key, masked_te.shape, masked_te.dtype)
    noisy_te = jax.lax.stop_gradient(masked_te) + noise_te
    if chosen_t is None:
        chosen_t = jnp.argmax(noisy_te, axis=-1).astype(jnp.int32)
    uniform_t = jax.random.uniform(uniform_key, best_t.shape, masked_te.dtype)
    return chosen_t, noisy_te, jnp.where(chosen_t == best_t, 0, uniform_t)


def select(
    options: SparseMixer,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes each valid token to one expert D, sampled from the masked softmax p.

    In training the weight is p_D, or p_D / 2 with probability 1/2 where D is not the
    best expert, and its derivative by p_D is 2:
    then the expected gradient of `c_D * weight` is that of `sum_e c_e p_e^2`. In
    evaluation D is the best and the weight p_D. The probabilities for the losses are
    those of all logits. Of an override, another K is refused.
    """
    common.refuse(override, "SparseMixer", top_k="it samples one expert")
    logits_te = common.adjusted(logits_te, override)
    masked_te = masked(logits_te, options.eps)
    chosen_t = override.expert_tk[:, 0] if common.replays(override) else None
    expert_t, choice_te, uniform_t = drawn(masked_te, chosen_t, mode, key)
    expert_tk = expert_t[:, None]
    weight_tk = common.gather(jax.nn.softmax(masked_te, axis=-1), expert_tk)
    if mode.train:
        factor_tk = jnp.where(uniform_t < 0.5, 1.0, 0.5)[:, None]
        weight_tk = multiplier(weight_tk, factor_tk.astype(weight_tk.dtype), 2.0)
    valid_tk = jnp.ones(expert_tk.shape, bool)
    if common.replays(override):
        valid_tk = common.replayed(override)[1]
    return Routing(
        expert_tk=expert_tk,
        weight_tk=weight_tk,
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=jax.nn.softmax(logits_te, axis=-1),
        logits_te=logits_te,
        choice_te=jax.lax.stop_gradient(choice_te),
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        expected_k=1.0,
    )
