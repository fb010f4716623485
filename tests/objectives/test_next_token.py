"""Cross-entropy of the next token, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.models.base import Output
from moe_jax.moe.routing import TRAIN
from moe_jax.objectives.next_token import NextToken, loss

B, S, V = 2, 3, 5


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(B, S, V)) * 3


@dataclasses.dataclass
class FixedLogits:
    """A model whose parameters are its logits."""

    seen: object = None

    def apply(self, params, router_state, inputs, *, key, mode, override):
        self.seen = (inputs, key, mode, override)
        return params, {"observed": router_state}, "aux"

    def output(self, params, hidden):
        return Output(hidden, jnp.eye(V), ("embed", "vocab"))


@pytest.mark.parametrize("z_weight", [0.0, 0.125])
def test_sums_weights_and_the_z_loss(float64, logits, z_weight):
    targets = np.array([[0, 4, 2], [1, 1, 3]], np.int32)
    weights = np.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    batch = {
        "tokens": np.array([[9, 0, 4], [7, 1, 1]], np.int32),
        "targets": targets,
        "positions": np.array([[0, 1, 2], [0, 0, 1]], np.int32),
        "segments": np.array([[1, 1, 1], [1, 2, 2]], np.int32),
        "weights": weights,
    }
    model = FixedLogits()

    def run(logits):
        found = loss(
            NextToken(logit_z_weight=z_weight),
            model,
            logits,
            "state",
            batch,
            key="key",
            mode=TRAIN,
            override="override",
        )
        return found.sum, found

    (total, found), grad = jax.value_and_grad(run, has_aux=True)(jnp.asarray(logits))
    inputs, *others = model.seen
    assert others == ["key", TRAIN, "override"]
    for name in ("tokens", "positions", "segments"):
        assert getattr(inputs, name) is batch[name]
    powers = np.exp(logits)
    probs = powers / powers.sum(axis=-1, keepdims=True)
    lse = np.log(powers.sum(axis=-1))
    hot = np.eye(V)[targets]
    nll = -np.log((probs * hot).sum(axis=-1))
    np.testing.assert_allclose(found.reported, (nll * weights).sum(), rtol=1e-12)
    want = ((nll + z_weight * lse**2) * weights).sum()
    np.testing.assert_allclose(total, want, rtol=1e-12)
    assert found.weight == 3.5
    assert found.observations == {"observed": "state"} and found.aux == "aux"
    want = weights[..., None] * (probs - hot + z_weight * 2 * lse[..., None] * probs)
    np.testing.assert_allclose(grad, want, rtol=1e-10, atol=1e-12)


def test_problems():
    root = config.Config()
    assert list(NextToken().problems("config.objective", root)) == []
    for name, value in (("logit_z_weight", -1.0), ("logit_chunk", -1)):
        found = list(NextToken(**{name: value}).problems("config.objective", root))
        assert found == [f"config.objective.{name}={value}: must not be negative"]
