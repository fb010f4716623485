"""The decoder: against numpy, causal, documents apart, cached, counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_numpy import by_hand
from decoding import (
    PACKED,
    RNG,
    STEPS,
    TOKENS,
    B,
    D,
    E,
    F,
    G,
    H,
    S,
    V,
    W,
    drawn,
    inputs,
    options,
)

from moe_jax.models.decoder import DecoderModel
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL, Observation, Override
from moe_jax.nn.feedforward import Dense
from moe_jax.tree import named_leaves


class Ready:
    """A model with weights and its compiled forward pass."""

    def __init__(self, made):
        self.model = DecoderModel(made)
        self.params = drawn(self.model)
        self.state = self.model.init_router_state()

        @jax.jit
        def forward(params, state, given, override):
            hidden, seen, aux = self.model.apply(
                params, state, given, key=None, mode=EVAL, override=override
            )
            return self.model.logits(params, hidden), seen, aux

        self._forward = forward

    def __call__(self, given, params=None, state=None, override=None):
        params = self.params if params is None else params
        state = self.state if state is None else state
        return self._forward(params, state, given, override)


@pytest.fixture(scope="module")
def ready():
    return Ready(options())


def test_logits_match_numpy(ready):
    logits, _, aux = ready(PACKED)
    text, want = np.asarray(PACKED.segments) > 0, by_hand(ready.params, PACKED)
    np.testing.assert_allclose(
        np.asarray(logits)[text], want[text], rtol=1e-3, atol=2e-4
    )
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(aux.health["counts"].sum(axis=1), [2 * 21] * 2)


def test_no_token_sees_a_later_one(ready):
    before = inputs(TOKENS, STEPS, np.ones((B, S)))
    first = np.asarray(ready(before)[0])
    for t in (1, 6, S - 1):
        changed = TOKENS.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        logits = np.asarray(ready(inputs(changed, STEPS, np.ones((B, S))))[0])
        np.testing.assert_allclose(logits[:, :t], first[:, :t], atol=1e-5)
        assert np.all(np.abs(logits[:, t:] - first[:, t:]).max(axis=-1) > 1e-3)


def test_documents_of_a_row_do_not_see_each_other(ready):
    packed = np.asarray(ready(PACKED)[0])
    alone = inputs(
        [TOKENS[0, 4:].tolist() + [5] * 4, TOKENS[1]],
        STEPS,
        [[1] * 5 + [0] * 7, [1] * 12],
    )
    np.testing.assert_allclose(
        packed[0, 4:9], np.asarray(ready(alone)[0])[0, :5], atol=1e-5
    )
    other = TOKENS.copy()
    other[0, :4] = (other[0, :4] + 3) % V
    changed = dataclasses.replace(PACKED, tokens=jnp.asarray(other, jnp.int32))
    logits = np.asarray(ready(changed)[0])
    np.testing.assert_allclose(logits[0, 4:9], packed[0, 4:9], atol=1e-5)
    assert np.abs(logits[0, :4] - packed[0, :4]).max() > 1e-2


def test_prefill_and_single_steps_give_the_logits_of_the_whole(ready):
    model, whole = ready.model, inputs(TOKENS, STEPS, np.ones((B, S)))
    want = np.asarray(ready(whole)[0])

    @jax.jit
    def decode(params, state, given, cache, start):
        hidden, cache = model.decode(params, state, given, cache, start, mode=EVAL)
        return model.logits(params, hidden), cache

    cache, start, found = model.init_cache(B, S + 3), 0, []
    for count in (7, 1, 1, 1, 1, 1):
        part = slice(start, start + count)
        given = jax.tree.map(lambda a, p=part: a[:, p], whole)
        logits, cache = decode(
            ready.params, ready.state, given, cache, jnp.int32(start)
        )
        found.append(np.asarray(logits))
        start += count
    np.testing.assert_allclose(np.concatenate(found, axis=1), want, atol=2e-5)


def test_stacked_figures_are_in_the_order_of_the_layers(ready):
    """An override row reaches its layer, and figures come back in the same row."""
    given = inputs(TOKENS, STEPS, np.ones((B, S)))
    shift = np.zeros((2, E), np.float32)
    shift[0, [0, 1]] = shift[1, [2, 3]] = 1e3
    override = Override(logit_shift=jnp.asarray(shift))
    _, seen, aux = ready(given, override=override)
    counts = np.asarray(aux.health["counts"])
    np.testing.assert_array_equal(counts, [[B * S, B * S, 0, 0], [0, 0, B * S, B * S]])
    np.testing.assert_array_equal(
        seen["segment_1"]["block_1"].sums["assignments"], counts
    )
    # Row 0 is the lower layer: what happens in row 1 does not reach it.
    plain = np.asarray(ready(given, override=Override(logit_shift=jnp.zeros((2, E))))[2]
                       .health["entropy"])  # fmt: skip
    upper = Override(logit_shift=jnp.asarray(shift * [[0], [1]], jnp.float32))
    lower = Override(logit_shift=jnp.asarray(shift * [[1], [0]], jnp.float32))
    entropy = np.asarray(ready(given, override=upper)[2].health["entropy"])
    assert entropy[0] == plain[0] and entropy[1] < 1e-3 + np.log(2)
    entropy = np.asarray(ready(given, override=lower)[2].health["entropy"])
    assert abs(entropy[1] - plain[1]) > 1e-4


def test_router_state_is_used_and_updated_by_layer(ready):
    given = inputs(TOKENS, STEPS, np.ones((B, S)))
    bias = np.zeros((2, E), np.float32)
    bias[0, [1, 2]] = bias[1, [0, 3]] = 1e3
    state = {"segment_1": {"block_1": {"bias": jnp.asarray(bias)}}}
    assert jax.tree.structure(state) == jax.tree.structure(ready.state)
    counts = np.asarray(ready(given, state=state)[2].health["counts"])
    np.testing.assert_array_equal(counts, np.where(bias > 0, B * S, 0))
    seen = Observation(sums={"assignments": jnp.asarray(counts)}, count=jnp.int32(24))
    new = ready.model.update_router_state(state, {"segment_1": {"block_1": seen}})
    np.testing.assert_allclose(
        new["segment_1"]["block_1"]["bias"], bias + np.where(bias > 0, -0.1, 0.1)
    )


# Matrices of one block, by hand.
ATTENTION = D * H * W + 2 * D * G * W + H * W * D
EXPERT = 3 * D * F
MIXTURE = D * E + 3 * D * 6
NORMS = 2 * D + 2 * W


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_by_hand(tied):
    model = DecoderModel(options(tie_embeddings=tied))
    outer = V * D * (1 if tied else 2)
    blocks = 6 * ATTENTION + 4 * 3 * D * 20 + 2 * MIXTURE
    norms = 6 * NORMS + D
    total, active = model.count_parameters()
    assert total == outer + blocks + 2 * E * EXPERT + norms
    assert active == outer + blocks + 2 * 2 * EXPERT + norms
    # Matrices that a token is multiplied with; not norms, not the lookup.
    matrices = V * D + blocks + 2 * 2 * EXPERT
    # Scores and mixing, 2 S H W each, three passes, half of them masked.
    attention = 6 * (2 * 2 * 10 * H * W) * 3 / 2
    np.testing.assert_allclose(model.flops_per_token(10), 6 * matrices + attention)


def test_an_untied_output_matrix_is_used():
    model = DecoderModel(
        options(num_layers=1, feed_forward=Dense(d_ff=4), tie_embeddings=False)
    )
    assert model.axes["output"] == ("embed", "vocab")
    params = {
        "embedding": jnp.ones((V, D)),
        "norm": {"scale": jnp.full(D, 2.0)},
        "output": jnp.asarray(RNG.normal(size=(D, V)), jnp.float32),
    }
    hidden = RNG.normal(size=(1, 2, D))
    want = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + 1e-6) * 2
    np.testing.assert_allclose(
        model.logits(params, jnp.asarray(hidden, jnp.float32)),
        want @ np.asarray(params["output"], np.float64),
        rtol=1e-4,
        atol=1e-4,
    )


def test_projections_to_the_residual_stream_begin_smaller():
    moe = MoE(num_experts=32, experts=ExpertFeedForward(d_ff=F))
    model = DecoderModel(options(num_layers=2, feed_forward=moe, d_model=64))
    params = named_leaves(jax.jit(model.init)(jax.random.key(0)))
    for name, w in params.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(w, np.ones(w.shape))
            continue
        divided = 2 if name.endswith(("w_o", "w_down")) else 1  # sqrt(2 * 2 layers)
        std = 0.02 if "scorer" in name else 0.3 / divided
        np.testing.assert_allclose(np.std(w), 0.9866 * std, rtol=0.06, err_msg=name)
        if "segment" in name:
            assert np.abs(np.asarray(w[0] - w[1])).max() > std / 2


def test_axes_mirror_the_parameters():
    model = DecoderModel(options(tie_embeddings=False))
    shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    is_axes = lambda v: isinstance(v, tuple)
    axes = {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            model.axes, is_leaf=is_axes
        )[0]
    }
    assert axes.keys() == shapes.keys()
    for name, leaf in shapes.items():
        assert len(axes[name]) == leaf.ndim, name
        assert (axes[name][0] is None) == ("segment" in name or "scale" in name)
