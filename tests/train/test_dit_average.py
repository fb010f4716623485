"""The average of a diffusion transformer's parameters, at the published decay."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.cli import config_file
from moe_jax.config import MeshConfig
from moe_jax.train import setup
from moe_jax.train.schedules import Constant
from moe_jax.train.step import Gradients, apply_gradients
from moe_jax.tree import named_leaves

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "dit" / "digits.py"


def test_three_steps_at_the_published_decay():
    """It begins at the weights, and moves by 1e-4 of the way each step."""
    config = config_file.load(str(DIGITS))
    config.model.num_layers, config.model.d_model = 1, 16
    config.train.ema_decay, config.mesh = 0.9999, MeshConfig(data=1)
    # Steps as large as the weights, so that 1e-4 of them is seen.
    config.optimizer.learning_rate, config.schedule = 1.0, Constant(warmup_steps=1)
    parts = setup.make_parts(config, jax.devices()[:1])
    state = setup.fresh_state(parts)
    wide = lambda tree: {n: np.float64(a) for n, a in named_leaves(tree).items()}
    average, first = wide(state.params), wide(state.params)
    for name, value in wide(state.ema).items():
        np.testing.assert_array_equal(value, first[name])
    rng = np.random.default_rng(0)

    @jax.jit
    def step(state, grads):
        one = jnp.float32(1)
        sums = dict(loss=one, reported=one, weight=one, observations={}, aux=None)
        found = Gradients(grads=grads, **sums)
        return apply_gradients(config, parts.model, parts.optimizer, state, found)[0]

    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    parts.model.update_router_state = lambda state, observations: state
    for _ in range(3):
        state = step(state, jax.tree.map(draw, state.params))
        params = wide(state.params)
        average = {n: 0.9999 * a + 0.0001 * params[n] for n, a in average.items()}
    for name, value in wide(state.ema).items():
        np.testing.assert_allclose(value, average[name], rtol=0, atol=1e-6)
    moved = max(np.abs(average[n] - first[n]).max() for n in average)
    assert 1e-4 < moved < 1e-3
