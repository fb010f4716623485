"""The objective of images, with a network of two numbers in the place of a model."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.diffusion import losses, times
from moe_jax.diffusion.pairing import Immiscible, Independent
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.processes.variance_preserving import VariancePreserving
from moe_jax.diffusion.weights import MinSNR
from moe_jax.models.base import ImageOutput
from moe_jax.models.dit_config import DiT
from moe_jax.models.masks.task_routing import TaskRouting
from moe_jax.moe.routing import EVAL, TRAIN
from moe_jax.objectives.denoising import Denoising, loss

B, SHAPE, CLASSES = 6, (4, 4, 2), 5
KEY = jax.random.key(4)
PARAMS = {"a": jnp.float32(0.4), "b": jnp.linspace(-1.0, 1.0, CLASSES + 1)}


class Network:
    """`a x + b[class]`, and twice the channels: the rest is `b[class]`."""

    def __init__(self, dropout=0.5, wide=False):
        self.options = types.SimpleNamespace(
            num_classes=CLASSES, condition_dropout=dropout
        )
        self.wide, self.seen = wide, []

    def apply(self, params, router_state, inputs, *, key, mode, override=None):
        self.seen.append(inputs)
        label = inputs.label
        if inputs.none is not None:
            label = jnp.where(inputs.none, CLASSES, label)
        shift = params["b"][label][:, None, None, None]
        found = params["a"] * inputs.x + shift
        if self.wide:
            found = jnp.concatenate([found, found * 0 + shift / 4], axis=-1)
        return ImageOutput(
            prediction=found,
            log_variance=params["b"][label],
            losses={},
            observations={},
            aux=None,
        )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": jnp.asarray(rng.normal(size=(B, *SHAPE)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, CLASSES, B), jnp.int32),
        "weights": jnp.asarray([1, 1, 1, 0, 1, 1], jnp.float32),
    }


def run(options, model=None, mode=TRAIN, given=None, **more):
    model = model or Network()
    found = loss(
        options, model, PARAMS, {}, given or batch(), key=KEY, mode=mode, **more
    )
    return found, model.seen[-1]


def eps_of(options, inputs, given):
    """The noise and the time by what the network saw."""
    process = make_process(options.process)
    if isinstance(options.process, RectifiedFlow):
        time = inputs.time
        alpha = (1 - time)[:, None, None, None]
        return process, time, (inputs.x - alpha * given["images"]) / (1 - alpha)
    time = inputs.time.astype(jnp.int32)
    abar = process.tables.alpha_bar[np.asarray(time)][:, None, None, None]
    x0 = np.asarray(given["images"], np.float64)
    return process, time, (inputs.x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)


def fixed(**fields):
    return VariancePreserving(variance="fixed_small", **fields)


@pytest.mark.parametrize("process", [RectifiedFlow(), fixed(), fixed(prediction="v")])
def test_the_squared_error_of_what_is_predicted(process):
    options, given = Denoising(process=process), batch()
    found, inputs = run(options, given=given)
    made, time, eps = eps_of(options, inputs, given)
    target = np.asarray(made.target(given["images"], jnp.asarray(eps), time))
    label = np.where(inputs.none, CLASSES, given["labels"])
    shift = np.asarray(PARAMS["b"])[label][:, None, None, None]
    error_b = np.mean((0.4 * inputs.x + shift - target) ** 2, axis=(1, 2, 3))
    want = np.sum(error_b * np.asarray(given["weights"]))
    np.testing.assert_allclose(found.reported, want, rtol=2e-4)
    np.testing.assert_allclose(found.sum, found.reported, rtol=1e-6)
    assert found.weight == 5
    np.testing.assert_array_equal(inputs.valid, given["weights"] > 0)
    assert len(set(np.asarray(time).tolist())) == B


def test_padding_says_nothing_even_where_it_is_not_a_number():
    given = batch()
    spoilt = given | {"images": given["images"].at[3].set(jnp.nan)}
    want, found = (
        run(Denoising(process=RectifiedFlow()), given=g)[0] for g in (given, spoilt)
    )
    np.testing.assert_array_equal(found.sum, want.sum)


def test_the_variational_bound_trains_the_variance_alone():
    options = Denoising(variational_weight=0.5)

    def value(params):
        found = loss(
            options, Network(wide=True), params, {}, batch(), key=KEY, mode=TRAIN
        )
        return found.sum - found.reported

    bits, grads = jax.value_and_grad(value)(PARAMS)
    assert bits > 0 and grads["a"] == 0 and np.any(grads["b"])
    model = Network(wide=True)
    found, inputs = run(options, model)
    process = make_process(options.process)
    prediction = model.apply(PARAMS, {}, inputs, key=None, mode=TRAIN).prediction
    want = losses.vb_bits(
        process, prediction, batch()["images"], inputs.x, inputs.time.astype(jnp.int32)
    )
    want = 0.5 * np.sum(np.asarray(want) * np.asarray(batch()["weights"]))
    np.testing.assert_allclose(found.sum - found.reported, want, rtol=1e-4)


def test_weights_by_time_and_further_terms():
    plain, inputs = run(Denoising(process=fixed()))
    capped, _ = run(Denoising(process=fixed(), weight=MinSNR(gamma=1.0)))
    assert capped.reported == plain.reported and capped.sum < plain.sum
    sure, _ = run(Denoising(process=fixed(), uncertainty=True))
    one = lambda label: np.asarray(PARAMS["b"])[label]
    u = one(np.where(inputs.none, CLASSES, batch()["labels"]))
    assert sure.reported == plain.reported
    # L / e^u + u of each image, from the errors of batches of one image.
    each = []
    for i in range(B):
        weights = jnp.zeros(B).at[i].set(batch()["weights"][i])
        each.append(
            run(Denoising(process=fixed()), given=batch() | {"weights": weights})
        )
    error_b = np.array([found.sum for found, _ in each])
    kept = np.asarray(batch()["weights"])
    want = np.sum((error_b * np.exp(-u) + u) * kept)
    np.testing.assert_allclose(sure.sum, want, rtol=1e-5)
    angle, _ = run(Denoising(process=fixed(), cosine_weight=2.0))
    assert 0 < angle.sum - plain.sum < 2 * 2 * 5


def test_conditions_are_withheld_in_training_alone():
    drawn = [
        run(Denoising(process=RectifiedFlow()), given=batch(s))[1].none
        for s in range(2)
    ]
    np.testing.assert_array_equal(*drawn)  # By the key, not by the images.
    assert 0 < int(drawn[0].sum()) < B
    assert not run(Denoising(process=RectifiedFlow()), mode=EVAL)[1].none.any()
    assert run(Denoising(process=RectifiedFlow()), Network(dropout=0.0))[1].none is None


def test_noise_goes_with_images():
    given, kept = batch(), np.asarray(batch()["weights"]) > 0

    def apart(pairing):
        options = Denoising(process=RectifiedFlow(), pairing=pairing)
        eps = eps_of(options, run(options, given=given)[1], given)[2]
        square_b = np.sum(np.square(eps - given["images"]), axis=(1, 2, 3))
        return np.sum(np.sqrt(square_b)[kept])

    assert apart(Immiscible()) < apart(Independent()) - 0.1


def test_model_guidance_moves_the_target_of_what_kept_its_class():
    options = Denoising(process=RectifiedFlow(), model_guidance=0.7)
    average = {"a": jnp.float32(0.9), "b": PARAMS["b"][::-1] * 3}
    found, inputs = run(options, average=average)
    eps = eps_of(options, inputs, batch())[2]
    target = np.asarray(eps - batch()["images"])
    b = np.asarray(average["b"])
    step = 0.7 * (b[np.asarray(batch()["labels"])] - b[CLASSES])
    step = np.where(inputs.none, 0, step)[:, None, None, None]
    label = np.where(inputs.none, CLASSES, batch()["labels"])
    shift = np.asarray(PARAMS["b"])[label][:, None, None, None]
    error_b = np.mean((0.4 * inputs.x + shift - target - step) ** 2, axis=(1, 2, 3))
    want = np.sum(error_b * np.asarray(batch()["weights"]))
    np.testing.assert_allclose(found.sum, want, rtol=2e-4)
    grads = jax.grad(
        lambda mean: (
            loss(
                options,
                Network(),
                PARAMS,
                {},
                batch(),
                key=KEY,
                mode=TRAIN,
                average=mean,
            ).sum
        )
    )(average)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "fields, model, words",
    [
        (dict(cosine_weight=-1.0), {}, "cosine_weight=-1.0: must not be negative"),
        (dict(variational_weight=0.0), {}, "nothing would train the variance"),
        ({}, dict(learned_variance=False), "needs twice the channels"),
        (dict(uncertainty=True), {}, "log_variance=False: set both or none"),
        (dict(model_guidance=1.0), {}, "set config.train.ema_decay"),
        (dict(model_guidance=1.0), dict(condition_dropout=0.0), "without condition"),
        ({}, dict(num_classes=0, condition_width=3), "no data source gives vectors"),
        (
            dict(process=RectifiedFlow(time_input="1000t")),
            dict(input_mask=TaskRouting()),
            "the network sees 0 for data and 1000 for noise",
        ),
    ],
)
def test_what_is_refused(fields, model, words):
    root = config.Config(model=DiT(**model), objective=Denoising(**fields))
    found = list(root.objective.problems("config.objective", root))
    assert any(words in problem for problem in found), found


def test_what_is_allowed():
    model = DiT(input_mask=TaskRouting())
    root = config.Config(model=model, objective=Denoising(times=times.LogitNormal()))
    assert not list(root.objective.problems("config.objective", root))
