"""Switch-DiT (Park et al. 2024): masks by linear experts that the time chooses."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.models.masks.by_time import ByTime
from moe_jax.moe.routing import Array, Condition
from moe_jax.moe.scorers.timestep import Timestep, TimestepScorer, logits
from moe_jax.nn import linear, module


@config.node
class SwitchDiT(ByTime):
    """`m = 1 + sum_topk g_j (x W_j + b_j)`, g a softmax of the time (2403.09176).

    W and b begin at zero: m is 1, and the model the one without a mask. The loss of
    `diffusion_prior` teaches different times which experts to share.

    Attributes:
      num_experts: E, of each block.
      top_k: experts of a time, K; g is not renormalised.
      prior_weight: of the loss; 0: none.
      prior_steps: T, times for which the prior is compared with the routers.
      init_std: deviation of the router's initial weights.
      dtype: of the router.
    """

    num_experts: int = 3
    top_k: int = 2
    prior_weight: float = 1.0
    prior_steps: int = 1000
    init_std: float = 0.02
    dtype: str = "float32"

    def problems(self, path, root):
        yield from self.time_problems(path)
        yield from config.dtype_problems(self, path, "dtype")
        least = dict(num_experts=1, top_k=1, prior_weight=0, prior_steps=2, init_std=0)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                yield f"{path}.{name}={getattr(self, name)}: must be at least {bound}"
        if self.top_k > self.num_experts:
            yield (
                f"{path}.top_k={self.top_k} is more than "
                f"{path}.num_experts={self.num_experts}"
            )

    def share(self, name):
        return self.top_k / self.num_experts if name in ("w", "b") else 1.0


def chosen(probs: Array, top_k: int) -> Array:
    """(..., E) bool: the K largest; of equal ones the first."""
    best = jax.lax.top_k(jax.lax.stop_gradient(probs), top_k)[1]
    return jnp.any(best[..., None] == jnp.arange(probs.shape[-1]), axis=-2)


class SwitchMask(nnx.Module):
    """See `SwitchDiT`."""

    def __init__(self, d_model: int, options: SwitchDiT, *, dtype: str, rngs: nnx.Rngs):
        self.top_k = options.top_k
        made = Timestep(init_std=options.init_std, dtype=options.dtype)
        self.scorer = TimestepScorer(d_model, options.num_experts, made, rngs)
        shape, axes = (options.num_experts, d_model, d_model), (None, "embed", None)
        self.w = module.matrix(rngs, shape, axes, dtype=dtype)
        self.b = module.param(rngs, shape[:2], (None, None), dtype=dtype)

    def __call__(self, x: Array, condition: Condition) -> Array:
        """(B, S, D). An image's experts are mixed first: they are linear."""
        router = self.scorer.w[...], self.scorer.b[...]
        probs_be = jax.nn.softmax(logits(condition.time_embedding, *router), axis=-1)
        gate_be = jnp.where(chosen(probs_be, self.top_k), probs_be, 0).astype(x.dtype)
        (w_bdf,) = linear.products(gate_be, ("batch", None), (self.w,))
        y = jnp.einsum("bsd,bdf->bsf", x, w_bdf)
        return 1 + y + (gate_be @ self.b[...].astype(x.dtype))[:, None]
