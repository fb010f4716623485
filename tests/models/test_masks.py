"""Masks on the blocks' input: golden windows, numpy, counts, rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_numpy import forward, silu, softmax, two_layers, waves
from test_dit import MOE, SINGLE, D, K, drawn, given, options, run

from moe_jax import config, config_json
from moe_jax.models.dit import DiTModel
from moe_jax.models.masks import MASKS
from moe_jax.models.masks.by_time import noise_level
from moe_jax.models.masks.switch_dit import SwitchDiT, SwitchMask
from moe_jax.models.masks.task_routing import TaskRouting, windows
from moe_jax.moe.routing import EVAL
from moe_jax.nn.module import Template
from moe_jax.tree import named_leaves

SWITCH = SwitchDiT(dtype="float64", prior_steps=50)
DTR = TaskRouting(beta=0.5)


def starts(channels, width, level, alpha=4.0):
    found = np.asarray(windows(jnp.asarray(level), alpha, channels, width))
    assert (found.sum(axis=1) == width).all()
    first = found.argmax(axis=1)
    for row, start in zip(found, first, strict=True):
        assert row[start : start + width].all()
    return list(first)


def test_golden_windows():
    at = np.array([0, 500, 750, 900, 999], np.float32) / 999
    assert starts(1024, 819, at) == [0, 13, 65, 135, 205]
    assert starts(10, 4, np.arange(5, dtype=np.float32) / 4) == [0, 0, 0, 2, 6]


@pytest.mark.parametrize("channels", [384, 768, 1024, 1152, 1408])
def test_windows_of_every_index_in_single_precision(channels):
    width = int(np.floor(0.8 * channels))
    want = np.round((np.arange(1000) / 999) ** 4 * (channels - width))
    time = jnp.arange(1000, dtype=jnp.float32)
    assert starts(channels, width, noise_level(TaskRouting(), time)) == list(want)


@pytest.mark.parametrize(
    ("data", "noise", "times"),
    [
        (0.0, 999.0, [0, 249.75, 999]),
        (0.0, 1.0, [0, 0.25, 1]),
        (0.0, 1000.0, [0, 250, 1000]),
        (1.0, 0.0, [1, 0.75, 0]),
    ],
)
def test_the_noise_of_a_time_in_every_convention(data, noise, times):
    made = TaskRouting(data_time=data, noise_time=noise)
    found = noise_level(made, jnp.asarray(times, jnp.float32))
    np.testing.assert_allclose(found, [0, 0.25, 1], rtol=1e-6)


def channel_mask(made):
    def mask(w, h, times):
        n = int(np.floor(made.beta * D))
        out = np.zeros((len(h), 1, D))
        for b, t in enumerate(times):
            s = int(np.round((t / 999) ** made.alpha * (D - n)))
            out[b, 0, s : s + n] = 1
        return out

    return mask


def switch_mask(params, top_k):
    def mask(w, h, times):
        m = np.ones_like(h)
        for b, t in enumerate(times):
            e = silu(two_layers(params["time"], waves(t)))
            g = softmax(e @ w["mask"]["scorer"]["w"] + w["mask"]["scorer"]["b"])
            for j in np.argsort(-g)[:top_k]:
                m[b] += g[j] * (h[b] @ w["mask"]["w"][j] + w["mask"]["b"][j])
        return m

    return mask


def by_hand(model, params, inputs, mask):
    params = jax.tree.map(np.asarray, params)
    (stacked,) = params["segment_0"].values()
    layers = range(model.options.num_layers)
    blocks = [jax.tree.map(lambda w, i=i: w[i], stacked) for i in layers]
    embedded = params["label"]["table"][np.asarray(inputs.label)]
    given = np.asarray(inputs.x), np.asarray(inputs.time), embedded
    return forward(params, blocks, *given, 2, "none", K, mask)


@pytest.mark.parametrize(
    ("made", "fields"), [(SWITCH, MOE), (DTR, {})], ids=["switch with MoE", "DTR"]
)
def test_the_prediction_is_that_of_numpy(float64, made, fields):
    model = DiTModel(options(num_layers=2, input_mask=made, **fields))
    params, inputs = drawn(model), given()
    inputs = dataclasses.replace(inputs, time=jnp.asarray([0, 700.0, 999]))
    mask = channel_mask(made)
    if made is SWITCH:
        mask = switch_mask(jax.tree.map(np.asarray, params), made.top_k)
    want, _ = by_hand(model, params, inputs, mask)
    found = run(model, params, inputs)[0]
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-9)
    plain, _ = by_hand(model, params, inputs, None)
    assert np.abs(plain - want).max() > 0.1


def test_gradients_of_the_switch_are_those_of_differences(float64):
    """Of the mask, and of what is before it; along one direction, by numpy."""
    model = DiTModel(options(num_layers=2, image_size=4, input_mask=SWITCH))
    params, inputs = drawn(model, 0.15), given()
    inputs = dataclasses.replace(inputs, x=inputs.x[:, :4, :4])

    def loss(params):
        return jnp.mean(
            model.apply(params, {}, inputs, key=None, mode=EVAL).prediction ** 2
        )

    def plain(params):
        mask = switch_mask(params, SWITCH.top_k)
        return np.mean(by_hand(model, params, inputs, mask)[0] ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, params))
    rng, names = np.random.default_rng(9), list(named_leaves(params))
    assert sum("/mask/" in name for name in names) == 4
    for i, (name, grad) in enumerate(zip(names, jax.tree.leaves(grads), strict=True)):
        if not any(part in name for part in ("/mask/", "time/", "patches/")):
            continue
        way = rng.normal(size=leaves[i].shape)
        moved = []
        for sign in (1, -1):
            other = leaves[i] + sign * 1e-5 * way
            moved.append(plain(tree.unflatten([*leaves[:i], other, *leaves[i + 1 :]])))
        want = (moved[0] - moved[1]) / 2e-5
        assert abs(want) > 1e-9, name
        assert abs(want - np.sum(way * grad)) < 1e-6 * abs(want) + 1e-10, name


def test_it_begins_as_the_model_without_a_mask():
    """To the last bit, operation by operation; all other weights are drawn."""
    plain = DiTModel(options(num_layers=1, **SINGLE))
    model = DiTModel(options(num_layers=1, input_mask=SwitchDiT(), **SINGLE))
    made = Template(lambda rngs: SwitchMask(D, SwitchDiT(), dtype="float32", rngs=rngs))
    begun = made.init_stacked(jax.random.key(0), 1)
    assert not begun["w"].any() and not begun["b"].any() and begun["scorer"]["w"].any()
    params = drawn(plain)
    block = params["segment_0"]["block_0"]
    masked = params | {"segment_0": {"block_0": block | {"mask": begun}}}
    with jax.disable_jit():  # The compiler may round sums of products once.
        found = run(model, masked, given("float32"))[0]
        want = run(plain, params, given("float32"))[0]
    assert np.abs(found).max() > 0.1
    np.testing.assert_array_equal(found, want)


def test_images_without_condition_have_the_mask_of_their_time(float64):
    """`none` is the null class, and changes nothing about the mask."""
    made = options(num_layers=1, input_mask=SWITCH, condition_dropout=0.5)
    model = DiTModel(made)
    params, inputs = drawn(model), given()
    none = dataclasses.replace(inputs, none=jnp.ones(3, bool))
    null = dataclasses.replace(inputs, label=jnp.full(3, 10))
    mask = switch_mask(jax.tree.map(np.asarray, params), SWITCH.top_k)
    want, _ = by_hand(model, params, null, mask)
    np.testing.assert_allclose(run(model, params, none)[0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("made", [SwitchDiT(num_experts=5), TaskRouting()], ids=str)
def test_counts(made):
    """By hand: experts, of which K serve; mixture and router meet an image once."""
    fields = dict(num_layers=3, **SINGLE)
    plain, model = (DiTModel(options(input_mask=m, **fields)) for m in (None, made))
    total, active, tokens = 0, 0, 16
    once, each = 0, 0
    if isinstance(made, SwitchDiT):
        router = D * 5 + 5
        total, active = 3 * (5 * (D * D + D) + router), 3 * (2 * (D * D + D) + router)
        once, each = 3 * (2 * D * D + D * 5), 3 * D * D
    more = np.subtract(model.count_parameters(), plain.count_parameters())
    assert list(more) == [total, active]
    more = model.flops_per_row(16) - plain.flops_per_row(16)
    assert more == 6 * (once + each * tokens)


@config.node
class Odd(config.InputMaskConfig):
    """A mask that nobody knows."""


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (SwitchDiT(), ""),
        (TaskRouting(), ""),
        (SwitchDiT(noise_time=0.0), "noise_time=0.0 is config.model.input_mask.data_t"),
        (SwitchDiT(num_experts=0, top_k=0), "num_experts=0: must be at least 1"),
        (SwitchDiT(top_k=4), "top_k=4 is more than config.model.input_mask.num_expert"),
        (SwitchDiT(prior_weight=-1.0), "prior_weight=-1.0: must be at least 0"),
        (SwitchDiT(prior_steps=1), "prior_steps=1: must be at least 2"),
        (SwitchDiT(dtype="float8"), "dtype='float8'"),
        (TaskRouting(data_time=999.0), "they must differ"),
        (TaskRouting(alpha=0.0), "alpha=0.0: must be positive"),
        (TaskRouting(beta=1.0), "beta=1.0: must lie in (0, 1)"),
        (TaskRouting(beta=float("inf")), "beta=inf: must lie in (0, 1)"),
        (TaskRouting(beta=0.03), "beta=0.03 leaves no channel of d_model=32"),
        (Odd(), "input_mask is a Odd, which is none of ['SwitchDiT', 'TaskRouting']"),
    ],
    ids=str,
)
def test_problems(made, words):
    root, model = config.Config(), options(input_mask=made)
    found = list(config.all_problems(model, "config.model", root))
    if words:
        assert any(words in one for one in found), found
    else:
        assert found == []
        assert config_json.from_dict(config_json.to_dict(model)) == model


def test_every_mask_is_shown_here():
    assert set(MASKS) == {SwitchDiT, TaskRouting}
