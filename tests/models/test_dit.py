"""The diffusion transformer: against numpy, its beginning, its counts, its rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_numpy import forward

from moe_jax import config
from moe_jax.models.base import ImageInputs
from moe_jax.models.dit import DiTModel
from moe_jax.models.dit_config import DiT, mlp
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL, TRAIN
from moe_jax.moe.scorers import SCORERS
from moe_jax.moe.scorers.linear import Linear, LinearScorer
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn import conditioning
from moe_jax.nn.conditioning import Perturbation
from moe_jax.tree import named_leaves

D, H, E, K, CLASSES, C, SIDE, B = 32, 4, 4, 2, 10, 3, 8, 3


def experts(width=D, count=E, **fields):
    """The layer of DiT-MoE: un-renormalised top-2, gated experts, shared ones."""
    return MoE(
        num_experts=count,
        experts=ExpertFeedForward(d_ff=4 * width),
        shared_d_ff=2 * width,
        selector=TopK(top_k=K, renormalize=False),
        balance=Balance(load_balance_weight=0.01, z_weight=0.0),
        **{"scorer": Linear(init_std=0.0)} | fields,
    )


def options(**fields):
    fields = {
        "image_size": SIDE,
        "in_channels": C,
        "patch_size": 2,
        "num_layers": 3,
        "d_model": D,
        "num_heads": H,
        "num_classes": CLASSES,
        "feed_forward": mlp(4 * D),
        "dtype": "float64",
        "param_dtype": "float64",
        "remat": "none",
        **fields,
    }
    return DiT(**fields)


SINGLE = dict(dtype="float32", param_dtype="float32")
# Blocks: dense, then (dense, MoE).
MIXED = dict(
    feed_forward=experts(
        scorer=Linear(init_std=0.0, dtype="float64"),
        dispatch=DenseDispatch(),
        first_dense=1,
        every=2,
        dense_d_ff=4 * D,
    )
)
TWO = dict(
    feed_forward=dataclasses.replace(MIXED["feed_forward"], first_dense=0)
)  # Dense, MoE.
MOE = dict(feed_forward=experts(scorer=Linear(init_std=0.0, dtype="float64")))


def drawn(model, scale=0.3):
    """Weights by numpy, all of them, for at the beginning the output is zero."""
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)
    return jax.tree.map(draw, shapes)


def given(dtype="float64", **fields):
    rng = np.random.default_rng(2)
    made = dict(
        x=jnp.asarray(rng.normal(size=(B, SIDE, SIDE, C)), dtype),
        time=jnp.asarray([0, 500, 999], dtype),
        label=jnp.asarray([4, CLASSES, 0], jnp.int32),
    )
    return ImageInputs(**made | fields)


def run(model, params, inputs, mode=EVAL, key=None):
    state = model.init_router_state()

    def step(params, inputs):
        found = model.apply(params, state, inputs, key=key, mode=mode)
        return found.prediction, found.observations, found.aux

    return jax.jit(step)(params, inputs)


def by_hand(model, params, inputs):
    params = jax.tree.map(np.asarray, params)
    blocks = []
    for i, seg in enumerate(model.segments):
        for r in range(seg.repeats):
            for name, _ in seg.named_blocks():
                part = params[f"segment_{i}"][name]
                blocks.append(jax.tree.map(lambda w, r=r: w[r], part))
    embedded = params["label"]["table"][np.asarray(inputs.label)]
    x, times = np.asarray(inputs.x), np.asarray(inputs.time)
    made = model.options
    return forward(params, blocks, x, times, embedded, made.patch_size, made.qk_norm, K)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(patch_size=4, learned_variance=False, num_layers=1),
        MOE | dict(qk_norm="layer", num_layers=2),
        MIXED,
    ],
    ids=["dense", "other patches", "MoE", "some MoE"],
)
def test_the_prediction_is_that_of_numpy(float64, fields):
    model = DiTModel(options(**fields))
    params, inputs = drawn(model), given()
    found, seen, aux = run(model, params, inputs)
    want, losses = by_hand(model, params, inputs)
    assert found.shape == want.shape == (B, SIDE, SIDE, model.options.out_channels)
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-10)
    if not losses:
        assert aux is None and seen == {}
        return
    np.testing.assert_allclose(
        aux.losses["load_balance_loss"], 0.01 * np.array(losses), rtol=1e-10
    )
    assert int(aux.stats.dropped.sum()) == 0
    np.testing.assert_array_equal(aux.health["counts"].sum(-1), B * 16 * K)


def test_gradients_are_those_of_differences(float64):
    """Of each weight, along one direction, by the numpy model; balance included."""
    model = DiTModel(options(num_layers=2, qk_norm="layer", image_size=4, **TWO))
    params, inputs = drawn(model, 0.15), given()
    inputs = dataclasses.replace(inputs, x=inputs.x[:, :4, :4])
    state, weight = model.init_router_state(), 3.0

    def loss(params):
        found = model.apply(params, state, inputs, key=None, mode=EVAL)
        balance = found.aux.losses["load_balance_loss"].sum()
        return jnp.mean(found.prediction**2) + weight * balance

    def plain(params):
        found, losses = by_hand(model, params, inputs)
        return np.mean(found**2) + weight * 0.01 * sum(losses)

    grads = jax.jit(jax.grad(loss))(params)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, params))
    rng, names = np.random.default_rng(9), list(named_leaves(params))
    for i, (name, grad) in enumerate(zip(names, jax.tree.leaves(grads), strict=True)):
        way = rng.normal(size=leaves[i].shape)
        moved = []
        for sign in (1, -1):
            other = leaves[i] + sign * 1e-5 * way
            moved.append(plain(tree.unflatten([*leaves[:i], other, *leaves[i + 1 :]])))
        want = (moved[0] - moved[1]) / 2e-5
        assert abs(want - np.sum(way * grad)) < 1e-6 * abs(want) + 1e-10, name
        assert abs(want) > 1e-6 or name.endswith("k_norm/bias"), name


def test_the_image_changes_with_all_that_it_is_told(float64):
    """Time, class, null class, and `none`, which is the null class."""
    model = DiTModel(options(num_layers=1))
    params, inputs = drawn(model), given()
    first = np.asarray(run(model, params, inputs)[0])

    def other(**fields):
        changed = dataclasses.replace(inputs, **fields)
        return np.asarray(run(model, params, changed)[0])

    changes = [
        other(time=inputs.time.at[0].set(1.0)),
        other(label=inputs.label.at[0].set(5)),
        other(label=inputs.label.at[0].set(CLASSES)),
    ]
    for found in changes:
        assert np.abs(found[0] - first[0]).max() > 1e-3
        np.testing.assert_allclose(found[1:], first[1:], rtol=1e-12)
    none = other(none=jnp.asarray([True, False, False]))
    np.testing.assert_array_equal(none, changes[2])


def test_perturbed_conditions_in_training(float64):
    """With a key the class' vector moves by up to g / sqrt(D); the time's does not."""
    model = DiTModel(options(num_layers=1, perturbation=Perturbation(strength=0.8)))
    params, inputs = drawn(model), given()
    key = jax.random.key(2)
    drawn_by = jax.random.fold_in(key, 1)
    delta = jax.random.uniform(drawn_by, (B, D), "float64", -1, 1) * 0.8 / np.sqrt(D)
    found = run(model, params, inputs, TRAIN, key)[0]
    # Three classes of three images: each has a row of the table for itself.
    moved = params["label"]["table"].at[inputs.label].add(delta)
    changed = params | {"label": {"table": moved}}
    want = run(model, changed, inputs)[0]
    np.testing.assert_allclose(found, want, rtol=1e-9)
    plain = run(model, params, inputs, EVAL, key)[0]
    np.testing.assert_allclose(plain, run(model, params, inputs)[0], rtol=1e-12)
    assert np.abs(np.asarray(plain - found)).max() > 1e-3


def test_the_learned_variance_of_the_loss(float64):
    model = DiTModel(options(num_layers=1, log_variance=True))
    params, inputs = drawn(model), given()
    state = model.init_router_state()
    apply = lambda p: model.apply(p, state, inputs, key=None, mode=EVAL).log_variance
    fresh = model.init(jax.random.key(0))
    np.testing.assert_array_equal(apply(fresh), np.zeros(B))
    first, second = (params["time"][name] for name in ("first", "second"))
    waves = conditioning.timestep_waves(inputs.time)
    hidden = jax.nn.silu(waves @ first["w"] + first["b"])
    time = hidden @ second["w"] + second["b"]
    last = params["log_variance"]
    want = time @ last["w"][:, 0] + last["b"][0]
    np.testing.assert_allclose(apply(params), want, rtol=1e-10)


def test_what_does_not_fit_is_refused():
    model = DiTModel(options(num_layers=1, **SINGLE))
    params, inputs = drawn(model), given("float32")

    def refused(words, model=model, mode=EVAL, **fields):
        changed = dataclasses.replace(inputs, **fields)
        with pytest.raises(ValueError, match=words):
            model.apply(params, {}, changed, key=None, mode=mode)

    shaken = DiTModel(options(perturbation=Perturbation(strength=1.0), **SINGLE))
    refused("draws in training: pass a key", shaken, mode=TRAIN)
    refused("label is missing: the model's condition is 10 classes", label=None)
    refused("image_size=8 and in_channels=3", x=inputs.x[:, :4])
    sure = DiTModel(options(condition_dropout=0.0, **SINGLE))
    refused("trained with some: .*dropout=0.0", sure, none=jnp.zeros(B, bool))
    alone = DiTModel(options(num_classes=0, condition_dropout=0.0, **SINGLE))
    refused("label is given: .* nothing but the time", alone)


def test_vectors_in_place_of_classes(float64):
    model = DiTModel(options(num_layers=1, num_classes=0, condition_width=5))
    params = drawn(model)
    label = jnp.asarray(np.random.default_rng(0).normal(size=(B, 5)))
    inputs = given(label=label)
    first = np.asarray(run(model, params, inputs)[0])
    none = dataclasses.replace(inputs, none=jnp.asarray([False, False, True]))
    null = params["vector"]["null"]
    replaced = dataclasses.replace(inputs, label=label.at[2].set(null))
    found = np.asarray(run(model, params, none)[0])
    np.testing.assert_allclose(found, run(model, params, replaced)[0], rtol=1e-12)
    assert np.abs(found[2] - first[2]).max() > 1e-3


def test_without_a_condition(float64):
    fields = dict(num_layers=1, num_classes=0, condition_dropout=0.0)
    model = DiTModel(options(**fields))
    params = drawn(model)
    assert "label" not in params and "vector" not in params
    found = run(model, params, given(label=None), TRAIN)[0]
    assert np.isfinite(found).all() and np.abs(found).max() > 0.1


@config.node
class Spy(Linear):
    """Scores the condition, and so shows that it arrives."""


class SpyScorer(LinearScorer):
    def __call__(self, tokens, carry, key, mode):
        told, count = tokens.condition, tokens.batch_shape[1]
        every = lambda a: a.reshape(-1, count, *a.shape[1:])
        assert told.embedding.shape == told.time_embedding.shape
        # A token's row is that of its image.
        code = every(told.time) / 100 + every(told.label) + 100 * every(told.none)
        logits = (
            jnp.zeros((code.size, self.w[...].shape[1])).at[:, 0].set(code.reshape(-1))
        )
        known = told.embedding - told.time_embedding
        return logits.at[:, 1].set(known.sum(axis=-1)), carry


def test_the_condition_reaches_the_scorers(float64, monkeypatch):
    monkeypatch.setitem(SCORERS, Spy, SpyScorer)
    model = DiTModel(options(feed_forward=experts(scorer=Spy()), num_layers=1))
    params, inputs = drawn(model), given()
    mode = dataclasses.replace(EVAL, capture=True)
    aux = run(model, params, inputs, mode)[2]
    logits = np.asarray(aux.routing.logits_te)[0].reshape(B, 16, E)
    code = [0 + 4, 5 + CLASSES + 100, 9.99 + 0]
    np.testing.assert_allclose(logits[:, :, 0], np.tile(code, (16, 1)).T, rtol=1e-6)
    labels = np.asarray(params["label"]["table"])[[4, CLASSES, 0]].sum(axis=-1)
    np.testing.assert_allclose(logits[:, :, 1], np.tile(labels, (16, 1)).T, rtol=1e-5)


def test_images_that_only_fill_the_batch_are_not_routed(float64):
    model = DiTModel(options(**MIXED))
    params = drawn(model)
    whole = run(model, params, given())[0]
    inputs = given(valid=jnp.asarray([True, False, True]))
    found, _, aux = run(model, params, inputs)
    np.testing.assert_array_equal(aux.health["counts"].sum(-1), 2 * 16 * K)
    np.testing.assert_allclose(found[::2], whole[::2], rtol=1e-10)


def test_the_beginning():
    """The output is zero; linear layers are Xavier's; tables have deviation 0.02."""
    fields = dict(d_model=64, num_layers=2, **SINGLE)
    ff = experts(64, every=2, dense_d_ff=256, dispatch=DenseDispatch())
    model = DiTModel(options(feed_forward=ff, **fields))
    params = jax.jit(model.init)(jax.random.key(0))
    found = run(model, params, given("float32"))[0]
    np.testing.assert_array_equal(found, np.zeros((B, SIDE, SIDE, 2 * C)))
    shapes = {
        "patches/w": 64 + 12,
        "w_q": 4 * 64,
        "w_k": 4 * 64,
        "w_v": 4 * 64,
        "w_o": 2 * 64,
        "feed_forward/w_up": 64 + 256,
        "feed_forward/w_down": 64 + 256,
        "experts/w_gate": 64 + 256,
        "experts/w_up": 64 + 256,
        "experts/w_down": 64 + 256,
        "shared/w_gate": 64 + 128,
        "shared/w_up": 64 + 128,
        "shared/w_down": 64 + 128,
    }
    bounds = {name: np.sqrt(6 / fans) for name, fans in shapes.items()}
    bounds["scorer/w"] = 1 / np.sqrt(64)
    normal = ("time/first/w", "time/second/w", "label/table")
    for name, w in named_leaves(params).items():
        w = np.asarray(w)
        bound = [b for end, b in bounds.items() if name.endswith(end)]
        if bound:
            assert 0.97 * bound[0] < np.abs(w).max() <= bound[0], name
            np.testing.assert_allclose(w.std(), bound[0] / np.sqrt(3), rtol=0.1)
        elif name in normal:
            np.testing.assert_allclose(w.std(), 0.02, rtol=0.1, err_msg=name)
        else:
            last = name.rsplit("/", 1)[-1]
            assert last in ("w", "b") or last.startswith("b_"), name
            assert "modulation" in name or "output" in name or last != "w", name
            assert not w.any(), name
