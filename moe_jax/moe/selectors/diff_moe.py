"""DiffMoE (Shi et al. 2025): experts choose from a pool, and learn how much they take.

In training each expert takes its best tokens of the whole batch. A predictor learns
which tokens those are, and a threshold how sure it was of the last one taken: in
evaluation they say how many tokens an expert takes, whatever the batch is.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, Groups, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import common, threshold
from moe_jax.nn import module
from moe_jax.parallel import rules


@config.node
class DiffMoE(config.SelectorConfig):
    """Expert choice over all tokens of the batch; over those of an image in evaluation.

    Attributes:
      capacity_factor: experts per token on average in training, c; each expert takes
        c * N / E of the N tokens of the batch, rounded down, at least one.
      decay: of the thresholds' average.
      predictor_weight: of the predictor's cross-entropy.
      eval_group: tokens of which an expert takes its best in evaluation: those of a
        "sequence" (an image), so that images do not depend on each other, or of the
        whole "batch" (the published code).
      init_std: deviation of the predictor's initial weights.
      dtype: of the predictor's weights and products.
    """

    capacity_factor: float = 1.0
    decay: float = 0.95
    predictor_weight: float = 1.0
    eval_group: str = "sequence"
    init_std: float = 0.02
    dtype: str = "float32"

    def experts_per_token(self, num_experts, sequence_length=0):
        return self.capacity_factor

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        yield from common.group_problems(self, path, "eval_group")
        for name in ("capacity_factor", "predictor_weight", "init_std"):
            if getattr(self, name) <= 0:
                yield f"{path}.{name}={getattr(self, name)}: must be positive"
        if not 0 <= self.decay < 1:
            yield f"{path}.decay={self.decay}: must lie in [0, 1)"

    def size_problems(self, path, num_experts):
        yield from common.capacity_problems(self, path, num_experts)


class CapacityPredictor(nnx.Module):
    """`silu(x W_in + b_in) W_out + b_out`; the features get no gradient."""

    def __init__(
        self, d_model: int, num_experts: int, options: DiffMoE, rngs: nnx.Rngs
    ):
        self.dtype = options.dtype
        normal = dict(std=options.init_std, dtype=options.dtype)
        zeros = dict(dtype=options.dtype)
        shape = (d_model, d_model)
        self.w_in = module.param(rngs, shape, ("embed", None), **normal)
        self.b_in = module.param(rngs, (d_model,), (None,), **zeros)
        shape = (d_model, num_experts)
        self.w_out = module.param(rngs, shape, ("embed", None), **normal)
        self.b_out = module.param(rngs, (num_experts,), (None,), **zeros)

    def __call__(self, tokens: Tokens) -> Array:
        """Logits (T, E) of each expert's taking each token."""
        x = jax.lax.stop_gradient(tokens.features).astype(self.dtype)
        hidden = jax.nn.silu(x @ rules.whole(self.w_in[...]) + self.b_in[...])
        return hidden @ rules.whole(self.w_out[...]) + self.b_out[...]


def _of_batch(options: DiffMoE, size: Array, num_experts: int) -> Array:
    return common.portion(size, options.capacity_factor, num_experts, "down")


def _groups(options: DiffMoE, tokens: Tokens, mode: Mode) -> Groups:
    rows, positions = tokens.batch_shape
    whole = mode.train or options.eval_group == "batch"
    return Groups(tokens.batch_shape, rows if whole else 1, positions)


def _taken(options, choice_te, tokens, router_state, mode) -> Array:
    """(T, E) bool."""
    groups = _groups(options, tokens, mode)
    if mode.train:
        number = lambda size_g: _of_batch(options, size_g, choice_te.shape[-1])
    else:
        sure_te = jax.nn.sigmoid(tokens.own) > router_state[threshold.STATE]
        sure_te = groups.split(sure_te & tokens.valid[:, None])
        number = lambda size_g: jnp.sum(sure_te, axis=1, dtype=jnp.int32)
    return common.take_best(choice_te, tokens, groups, number)


def select(
    options: DiffMoE,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Routing:
    """Routes to each expert its best tokens; weights are softmax scores.

    In evaluation an expert takes as many tokens of a group as there are whose predicted
    probability passes the expert's threshold: the best ones by score. Of an override,
    another K is refused.

    Args:
      options: the config.
      logits_te: (T, E).
      tokens: `own` is what the predictor says, (T, E).
      router_state: {"threshold": (E,)}; used in evaluation.
      mode: training or evaluation.
      override: pruned experts, shifted logits, or a routing to replay.
      key: not used; the choice is deterministic.

    Returns:
      Routing with K = E: slot k is expert k.
    """
    common.refuse(override, "DiffMoE", top_k="experts choose; see capacity_factor")
    logits_te = common.adjusted(logits_te, override)
    scores_te, probs_te = common.scores_and_probs("softmax", logits_te)
    choice_te = common.compared(scores_te, {}, override)
    num_experts = logits_te.shape[-1]
    if common.replays(override):
        expert_tk, valid_tk = common.replayed(override)
    else:
        valid_tk = _taken(options, choice_te, tokens, router_state, mode)
        experts = jnp.arange(num_experts, dtype=jnp.int32)
        expert_tk = jnp.broadcast_to(experts, valid_tk.shape)
    return Routing(
        expert_tk=expert_tk,
        weight_tk=common.gather(scores_te, expert_tk),
        valid_tk=valid_tk & tokens.valid[:, None],
        probs_te=probs_te,
        logits_te=logits_te,
        choice_te=choice_te,
        valid_t=tokens.valid,
        num_experts=num_experts,
        expected_k=options.capacity_factor,
        group_t=_groups(options, tokens, mode).of_tokens(),
    )


def losses(
    options: DiffMoE, routing: Routing, tokens: Tokens, scorer: object
) -> dict[str, Array]:
    """Cross-entropy of the predictor, mean over valid tokens and experts, nats.

    Its targets are which experts serve the token, as routed.
    """
    own_te, served_te = tokens.own, common.served(routing)
    lost_te = jax.nn.softplus(own_te) - jnp.where(served_te, own_te, 0)
    lost_te = jnp.where(routing.valid_t[:, None], lost_te, 0)
    count = jnp.maximum(jnp.sum(routing.valid_t), 1) * routing.num_experts
    mean = jnp.sum(lost_te) / count.astype(lost_te.dtype)
    return {"capacity_predictor_loss": options.predictor_weight * mean}


class State:
    """The thresholds of the experts, {"threshold": (E,)}."""

    @staticmethod
    def init(options: DiffMoE, num_experts: int) -> dict[str, Array]:
        """Zeros: every token passes."""
        return threshold.init((num_experts,))

    @staticmethod
    def observe(options: DiffMoE, routing: Routing, tokens: Tokens) -> dict[str, Array]:
        """The K-th largest probability that the predictor gives, K as in training."""
        sure_te = jnp.where(tokens.valid[:, None], jax.nn.sigmoid(tokens.own), -1)
        size = jnp.sum(tokens.valid, dtype=jnp.int32)
        last = _of_batch(options, size, routing.num_experts) - 1
        best_te = -jnp.sort(-jax.lax.stop_gradient(sure_te), axis=0)
        return threshold.seen(
            jnp.where(size > 0, jnp.take(best_te, last, axis=0), 0), size > 0
        )

    @staticmethod
    def update(options: DiffMoE, state, sums) -> dict[str, Array]:
        """The running average."""
        return threshold.update(options.decay, state, sums)
