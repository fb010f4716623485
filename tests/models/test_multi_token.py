"""Multi-token prediction against numpy, and what it adds to the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.models import multi_token
from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL, TRAIN
from moe_jax.nn.feedforward import Dense
from moe_jax.nn.rope import Rope
from moe_jax.objectives import next_token
from moe_jax.objectives.next_token import NextToken
from moe_jax.tree import named_leaves

V, D, S, E = 12, 4, 7, 4
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
TARGETS = np.array([[1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
WEIGHTS = np.array([[1, 1, 1, 0, 1, 1, 1], [1, 0.5, 1, 1, 0, 0, 0]])


def batch():
    ints = dict(tokens=TOKENS, targets=TARGETS, positions=POSITIONS, segments=SEGMENTS)
    made = {name: jnp.asarray(a, jnp.int32) for name, a in ints.items()}
    return made | {"weights": jnp.asarray(WEIGHTS, jnp.float32)}


def model_of(feed_forward, **fields):
    return DecoderModel(
        Decoder(
            **dict(
                vocab_size=V,
                num_layers=1,
                d_model=D,
                num_heads=1,
                feed_forward=feed_forward,
                rope=Rope(theta=50.0),
                dtype="float32",
                init_std=0.5,
                mtp=2,
                remat="none",
            )
            | fields
        )
    )


def drawn(model):
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        w = rng.normal(size=leaf.shape) * 0.5
        return jnp.asarray(1 + w if path[-1].key == "scale" else w, jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def norm(x, w):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * w["scale"]


def turn(x, position):
    z = x[: D // 2] + 1j * x[D // 2 :]
    z = z * np.exp(1j * position * 50.0 ** (-np.arange(D // 2) / (D // 2)))
    return np.concatenate([z.real, z.imag])


def block_by_hand(w, x, positions, sees):
    """(S, D) through one dense block; `sees[s]` are the places that s attends to."""
    a, normed = w["attention"], norm(x, w["attention_norm"])
    q, k, v = (normed @ a[name][:, 0] for name in ("w_q", "w_k", "w_v"))
    out = np.zeros_like(x)
    for s in range(len(x)):
        query = turn(q[s], positions[s]) / np.sqrt(D)
        scores = np.exp([query @ turn(k[m], positions[m]) for m in sees[s]])
        out[s] = scores / scores.sum() @ v[sees[s]] @ a["w_o"][0]
    x = x + out
    f, normed = w["feed_forward"], norm(x, w["feed_forward_norm"])
    gate = normed @ f["w_gate"]
    return x + (gate / (1 + np.exp(-gate)) * (normed @ f["w_up"])) @ f["w_down"]


def by_hand(params, row):
    """For each depth a dict from places that predict to their logits (V,)."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    tokens, positions, segments = TOKENS[row], POSITIONS[row], SEGMENTS[row]
    same = lambda s, m: segments[s] == segments[m] > 0
    sees = [[m for m in range(s + 1) if same(s, m)] or [s] for s in range(S)]
    first = jax.tree.map(lambda w: w[0], params["segment_0"]["block_0"])
    x = block_by_hand(first, params["embedding"][tokens], positions, sees)
    hidden, found = norm(x, params["norm"]), []
    for k in range(2):
        w = params[f"mtp_{k}"]
        there = [s for s in range(S - k - 1) if same(s, s + k + 1)]
        x = np.zeros((S, D))
        for s in there:
            embedded = norm(params["embedding"][tokens[s + k + 1]], w["embedding_norm"])
            joined = np.concatenate([embedded, norm(hidden[s], w["hidden_norm"])])
            x[s] = joined @ w["project"]
        seen = [[m for m in sees[s] if m in there] or [s] for s in range(S)]
        hidden = norm(block_by_hand(w["block"], x, positions, seen), w["norm"])
        found.append({s: hidden[s] @ params["embedding"].T for s in there})
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_loss_is_that_of_numpy(remat):
    model = model_of(Dense(d_ff=6), remat=remat)
    params = drawn(model)

    @jax.jit
    def losses(params):
        def run(weight, mode):
            options = NextToken(mtp_weight=weight)
            given = dict(key=None, mode=mode)
            return next_token.loss(options, model, params, {}, batch(), **given)

        return run(0.0, TRAIN).sum, run(0.3, TRAIN), run(0.3, EVAL).sum

    alone, found, evaluated = losses(params)
    want = 0.0
    for row in range(2):
        for k, logits in enumerate(by_hand(params, row), start=1):
            for s, z in logits.items():
                # The target of place s + k is k + 1 places beyond s.
                power = np.exp(z)
                nll = -np.log(power[TARGETS[row, s + k]] / power.sum())
                want += 0.3 / 2 * WEIGHTS[row, s + k] * nll
    np.testing.assert_allclose(found.sum - alone, want, rtol=1e-5)
    np.testing.assert_allclose(found.reported, alone, rtol=1e-6)
    np.testing.assert_allclose(evaluated, alone, rtol=1e-6)
    assert found.weight == WEIGHTS.sum()


def test_targets_by_hand():
    given = batch()
    names = ("tokens", "positions", "segments")
    inputs = TokenInputs(**{name: given[name] for name in names})
    targets, weights = multi_token.targets(
        given["targets"], given["weights"], inputs, 2
    )
    np.testing.assert_array_equal(
        weights, [[1, 0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(np.asarray(targets)[0, [0, 4]], [1, 6])
    ahead = multi_token.ahead(inputs, 1)
    np.testing.assert_array_equal(
        ahead.segments, [[1, 1, 1, 0, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(np.asarray(ahead.tokens)[0, :3], [1, 4, 1])
    np.testing.assert_array_equal(ahead.positions, POSITIONS)


def mixture(**balance):
    return MoE(
        num_experts=E,
        experts=ExpertFeedForward(d_ff=6),
        balance=Balance(bias_rate=0.1, **balance),
    )


def test_experts_of_the_modules_have_gradients_figures_and_a_bias():
    model = model_of(mixture(pooled_weight=0.1), num_layers=2)
    params, state = drawn(model), model.init_router_state()
    assert state["mtp_1"]["block"]["bias"].shape == (1, E)

    @jax.jit
    def run(params):
        def total(params):
            found = next_token.loss(
                NextToken(mtp_weight=0.3),
                model,
                params,
                state,
                batch(),
                key=None,
                mode=TRAIN,
            )
            return found.sum, found

        return jax.grad(total, has_aux=True)(params)

    grads, found = run(params)
    for name, grad in named_leaves(grads).items():
        assert np.abs(grad).max() > 0, name
    counts = np.asarray(found.aux.health["counts"])
    # Tokens that are there, two experts each; ahead fewer are.
    np.testing.assert_array_equal(counts.sum(axis=1), [24, 24, 18, 12])
    new = model.update_router_state(state, found.observations)
    mean = counts[3].sum() / E
    np.testing.assert_allclose(
        new["mtp_1"]["block"]["bias"][0], 0.1 * np.sign(mean - counts[3]), atol=1e-7
    )


def test_parameters_and_flops():
    with_two, without = (model_of(mixture(), num_layers=2, mtp=mtp) for mtp in (2, 0))
    block = 4 * D * D + D * E + E * 3 * D * 6
    module = 2 * D * D + block + 5 * D
    total, active = with_two.count_parameters()
    assert total - without.count_parameters()[0] == 2 * module
    assert active == without.count_parameters()[1]
    served = 2 * D * D + 4 * D * D + D * E + 2 * 3 * D * 6 + V * D
    more = with_two.flops_per_token(10) - without.flops_per_token(10)
    np.testing.assert_allclose(more, 2 * (6 * served + 6 * D * 10))


@pytest.mark.parametrize(
    ("mtp", "weight", "words"),
    [
        (0, 0.1, "objective.mtp_weight=0.1 would be ignored"),
        (1, 0.0, "config.model.mtp=1 would not be trained"),
        (1, 0.1, ""),
        (0, 0.0, ""),
        (1, -0.1, "must not be negative"),
    ],
)
def test_problems(mtp, weight, words):
    objective = NextToken(mtp_weight=weight)
    root = config.Config(model=model_of(Dense(), mtp=mtp).options, objective=objective)
    found = list(objective.problems("config.objective", root))
    assert words in found[0] if words else not found
