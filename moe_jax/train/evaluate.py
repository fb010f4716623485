"""Held-out loss, and what each expert does."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.moe import mixing
from moe_jax.moe.routing import EVAL, Mixing, Mode
from moe_jax.objectives import OBJECTIVES
from moe_jax.parallel import batches
from moe_jax.train.setup import Parts
from moe_jax.train.state import TrainState

# Histogram cells (layers * experts * vocabulary) up to which typical tokens are
# counted: 64 million int32 are 256 MB.
_MOST_CELLS = 64_000_000


class Evaluator:
    """Scores batches with the parameters of a state; compiles once.

    Args:
      parts: of the run.
      bytes_per_token: of the held-out text, to turn nats per token into bits per
        byte where not all of it is scored.
    """

    def __init__(self, parts: Parts, bytes_per_token: float):
        self._parts = parts
        self._bytes_per_token = bytes_per_token
        everywhere = NamedSharding(parts.mesh, PartitionSpec())
        self._sums = jax.jit(self._batch_sums, out_shardings=everywhere)
        self._uses = jax.jit(self._batch_uses, out_shardings=everywhere)

    def _loss(self, state: TrainState, batch, mode: Mode):
        objective = self._parts.config.objective
        return OBJECTIVES[type(objective)](
            objective,
            self._parts.model,
            state.eval_params,
            state.router_state,
            batch,
            key=None,
            mode=mode,
        )

    def _batch_sums(self, state: TrainState, batch) -> dict[str, jax.Array]:
        found = self._loss(state, batch, EVAL)
        sums = {"nll": found.reported, "tokens": found.weight}
        if found.aux is not None:
            sums["dropped"] = jnp.sum(found.aux.stats.dropped)
            sums["assignments"] = jnp.sum(found.aux.stats.assignments)
        return sums

    def _batch_uses(self, state: TrainState, batch) -> jax.Array:
        """How often each expert of each layer serves each token id, (L, E, V)."""
        routing = self._loss(state, batch, Mode(train=False, capture=True)).aux.routing
        if isinstance(routing, Mixing):  # Every expert has a part in every token.
            routing = jax.vmap(mixing.as_routing)(routing)
        vocab_size = self._parts.config.model.vocab_size
        ids_t = batch["tokens"].reshape(-1)

        def layer(expert_tk, valid_tk):
            ids_tk = jnp.broadcast_to(ids_t[:, None], expert_tk.shape)
            cells = jnp.zeros((routing.num_experts, vocab_size), jnp.int32)
            return cells.at[expert_tk, ids_tk].add(valid_tk.astype(jnp.int32))

        return jax.vmap(layer)(routing.expert_tk, routing.valid_tk)

    def _batches(self, data: Any, max_batches: int):
        parts = self._parts
        size = parts.eval_batch_size
        first, count = batches.rows_of_process(parts.mesh, size)
        for batch in data.eval_batches(
            batch_size=size, max_batches=max_batches, rows=(first, count)
        ):
            yield batches.put(batch, parts.mesh, size, first)

    def score(self, state: TrainState, data: Any, max_batches: int = 0) -> dict:
        """Figures over the held-out text, or its first `max_batches` batches.

        Returns:
          loss (nats per token), perplexity, bits_per_byte, tokens, drops (assignments
          that no expert served) and drop_fraction.
        """
        with jax.set_mesh(self._parts.mesh):
            sums = _add_up(
                self._sums(state, batch) for batch in self._batches(data, max_batches)
            )
        if not sums.get("tokens"):
            return {}
        loss = sums["nll"] / sums["tokens"]
        figures = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self._bits_per_byte(sums, data, whole=not max_batches),
            "tokens": int(sums["tokens"]),
        }
        if "assignments" in sums:
            figures["drops"] = int(sums["dropped"])
            figures["drop_fraction"] = sums["dropped"] / max(1, sums["assignments"])
        return figures

    def _bits_per_byte(self, sums: dict[str, float], data: Any, whole: bool) -> float:
        bits = sums["nll"] / math.log(2)
        if whole:
            return bits / data.bytes_in("validation")
        return bits / (sums["tokens"] * self._bytes_per_token)

    def expert_uses(self, state: TrainState, data: Any, max_batches: int = 8):
        """Counts (L, E, V) over some held-out batches; None where there is no MoE.

        None too where the table would be too large for the vocabulary.
        """
        model, options = self._parts.model, self._parts.config.model
        layers = getattr(model, "num_moe_layers", 0)
        if not layers:
            return None
        if layers * options.feed_forward.num_experts * options.vocab_size > _MOST_CELLS:
            return None
        with jax.set_mesh(self._parts.mesh):
            found = [
                np.asarray(self._uses(state, batch))
                for batch in self._batches(data, max_batches)
            ]
        return sum(found) if found else None


def _add_up(items: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
    """Sums in float64 on the host, one batch behind the device."""
    sums: dict[str, float] = {}

    def add(item):
        for name, value in jax.device_get(item).items():
            sums[name] = sums.get(name, 0.0) + float(value)

    before = None
    for item in items:
        if before is not None:
            add(before)
        before = item
    if before is not None:
        add(before)
    return sums


def typical_tokens(uses_lev: np.ndarray, top: int = 8) -> np.ndarray:
    """The tokens that mark each expert: ids (L, E, top), -1 where there are fewer.

    Ranked by `n log(P(v | e) / P(v))`, so that a token which is frequent everywhere
    marks nobody.
    """
    uses = uses_lev.astype(np.float64)
    per_expert = uses / np.maximum(uses.sum(-1, keepdims=True), 1)
    overall = uses.sum(1, keepdims=True) / np.maximum(
        uses.sum((1, 2), keepdims=True), 1
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(uses > 0, uses * np.log(per_expert / overall), -np.inf)
    ids = np.argsort(-score, axis=-1, kind="stable")[..., :top]
    return np.where(np.take_along_axis(score, ids, -1) > 0, ids, -1)
