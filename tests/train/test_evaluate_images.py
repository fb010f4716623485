"""Held-out images: loss by time, uses of experts, and samples, on several meshes."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.diffusion.guidance import Autoguidance, ClassifierFree, Unguided
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.samplers.euler import Euler
from moe_jax.errors import UserError
from moe_jax.infer.denoiser import denoiser
from moe_jax.infer.images import ImageSampler, classes_in_turn
from moe_jax.quality import denoising
from moe_jax.train import setup
from moe_jax.train.evaluate_images import ImageEvaluator

ROOT = pathlib.Path(__file__).parents[2]
N, PATCHES, E, K = 21, 16, 4, 2


class Held:
    """Some images of noise, held out."""

    num_classes = 10

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = rng.uniform(-1, 1, (N, 8, 8, 1)).astype(np.float32)
        self.labels = rng.integers(0, 10, N).astype(np.int32)

    def eval_batches(self, *, batch_size, max_batches=0, rows=None):
        first, count = rows or (0, batch_size)
        batches = -(-N // batch_size)
        for i in range(min(max_batches, batches) if max_batches else batches):
            at = i * batch_size + first + np.arange(count)
            there, at = at < N, np.minimum(at, N - 1)
            yield {
                "images": self.images[at] * there[:, None, None, None],
                "labels": self.labels[at] * there,
                "weights": there.astype(np.float32),
            }


def make(mesh=None, batch_size=16):
    spec = importlib.util.spec_from_file_location(
        "digits", ROOT / "configs" / "dit" / "digits.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.num_layers, config.model.d_model = 2, 32
    config.model.feed_forward.experts.d_ff = config.model.feed_forward.shared_d_ff = 32
    config.train.batch_size, config.train.ema_decay = batch_size, 0.0
    config.mesh = mesh or MeshConfig(data=1)
    return setup.make_parts(config, jax.devices()[: config.mesh.fixed_devices()])


@pytest.fixture(scope="module")
def params():
    """Random, where fresh ones would say nothing behind their gates."""
    rng = np.random.default_rng(1)
    shapes = make().abstract.params
    return jax.tree.map(
        lambda a: rng.normal(size=a.shape, scale=0.2).astype(np.float32), shapes
    )


def state_of(parts, params):
    fresh = setup.fresh_state(parts)
    params = jax.device_put(params, parts.shardings.params)
    return dataclasses.replace(fresh, params=params)


@pytest.fixture(scope="module")
def alone(params):
    parts = make()
    return parts, state_of(parts, params), ImageEvaluator(parts)


def test_the_loss_is_the_mean_of_the_images_losses(alone):
    """Of each image by itself, by its number, without padding."""
    parts, state, evaluator = alone
    data, process = Held(), make_process(parts.config.objective.process)

    @jax.jit
    def one(image, label, row):
        batch = {"images": image, "weights": jnp.ones(1)}
        given = parts.model, state.params, state.router_state, process
        denoise = denoiser(*given, label=label, none=jnp.zeros(1, bool))
        return denoising.loss_sums(process, denoise, batch, row).loss

    rows = jnp.arange(N)[:, None]
    each = [one(data.images[r], data.labels[r], r) for r in rows]
    found = evaluator.score(state, data)
    np.testing.assert_allclose(found["by_time"], np.mean(each, axis=0), rtol=1e-5)
    assert found["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    assert found["images"] == N


@pytest.mark.parametrize(
    "mesh, batch_size",
    [(MeshConfig(data=1), 8), (MeshConfig(data=2, expert=2, tensor=2), 16)],
    ids=["smaller batches", "a mesh"],
)
def test_figures_do_not_depend_on_batches_or_mesh(alone, params, mesh, batch_size):
    _, state, evaluator = alone
    want = evaluator.score(state, Held())
    uses = evaluator.expert_uses(state, Held())
    other = make(mesh, batch_size)
    there, of_other = state_of(other, params), ImageEvaluator(other)
    found = of_other.score(there, Held())
    np.testing.assert_allclose(found["by_time"], want["by_time"], rtol=2e-5)
    assert found["images"] == want["images"] == N
    again = of_other.expert_uses(there, Held())
    np.testing.assert_array_equal(again.class_n, uses.class_n)
    np.testing.assert_array_equal(again.bin_n, uses.bin_n)


def test_uses_of_experts_add_up(alone):
    _, state, evaluator = alone
    data = Held()
    uses = evaluator.expert_uses(state, data)
    assert uses.image_nle.shape == (N, 2, E)
    np.testing.assert_array_equal(uses.image_nle.sum(-1), PATCHES * K)
    assert uses.position_lep.shape == (2, E, PATCHES)
    np.testing.assert_array_equal(uses.position_lep.sum(1), N * K)
    np.testing.assert_array_equal(uses.position_lep.sum(2), uses.image_nle.sum(0))
    np.testing.assert_array_equal(uses.class_n, data.labels)
    assert np.bincount(uses.bin_n, minlength=10).min() >= 1


def test_samples_and_their_guidance(alone):
    parts, state, _ = alone
    labels = classes_in_turn(7, 10)

    def drawn(guidance, count=7, batch=8):
        sampler = ImageSampler(parts, Euler(steps=3), guidance, batch)
        given = state.params, state.router_state, labels[:count], 5
        images, spent = zip(*sampler.draw(*given), strict=True)
        return np.concatenate(images), spent

    plain, spent = drawn(Unguided())
    assert plain.shape == (7, 8, 8, 1) and spent == (3,)
    fewer, _ = drawn(Unguided(), count=2)
    np.testing.assert_array_equal(fewer, plain[:2])
    in_parts, spent = drawn(Unguided(), batch=4)
    np.testing.assert_allclose(in_parts, plain, atol=1e-5)
    assert spent == (3, 3)
    away, spent = drawn(ClassifierFree(scale=3.0))
    assert spent == (6,) and np.abs(away - plain).max() > 1e-3
    worse, spent = drawn(Autoguidance(scale=2.0, top_k=1))
    assert spent == (6,) and np.abs(worse - plain).max() > 1e-3
    with pytest.raises(UserError, match="fewer experts per token"):
        drawn(Autoguidance(scale=2.0, top_k=2))


def test_without_a_null_class_there_is_no_guidance():
    parts = make()
    parts.config.model.condition_dropout = 0.0
    with pytest.raises(UserError, match=r"condition_dropout=0.0\) and cannot do"):
        ImageSampler(parts, Euler(), ClassifierFree(scale=2.0), 8)
