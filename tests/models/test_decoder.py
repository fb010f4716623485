"""The decoder: against numpy, causal, documents apart, cached, counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.models import build
from moe_jax.models import remat as remat_lib
from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.models.decoder_config import Decoder, segments_of
from moe_jax.models.segments import Kind, Segment
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL, TRAIN, Observation, Override
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.feedforward import Dense
from moe_jax.nn.rope import Rope
from moe_jax.tree import named_leaves

V, D, H, G, W, F, E, B, S = 32, 16, 4, 2, 4, 24, 4, 2, 12


def options(**fields):
    """Six blocks: dense, (dense, MoE) twice, dense."""
    moe = MoE(
        num_experts=E,
        experts=ExpertFeedForward(d_ff=F),
        scorer=Linear(init_std=0.5),
        shared_d_ff=6,
        balance=Balance(bias_rate=0.1),
        first_dense=1,
        every=2,
        dense_d_ff=20,
    )
    fields = {
        "vocab_size": V,
        "num_layers": 6,
        "d_model": D,
        "num_heads": H,
        "num_kv_heads": G,
        "feed_forward": moe,
        "qk_norm": "head",
        "rope": Rope(theta=100.0),
        "init_std": 0.3,
        "dtype": "float32",
        "remat": "none",
        **fields,
    }
    return Decoder(**fields)


def inputs(tokens, positions, segments):
    as_int = lambda a: jnp.asarray(np.array(a), jnp.int32)
    return TokenInputs(
        tokens=as_int(tokens), positions=as_int(positions), segments=as_int(segments)
    )


def drawn(model):
    """Weights by numpy, which compiles nothing; norm scales around one."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        w = rng.normal(size=leaf.shape) * 0.3
        w = 1 + w if path[-1].key == "scale" else w
        return jnp.asarray(w, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


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


RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, S))
STEPS = np.tile(np.arange(S), (B, 1))
PACKED = inputs(
    TOKENS,
    [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], list(range(12))],
    [[1] * 4 + [2] * 5 + [0] * 3, [1] * 12],
)


def by_hand(params, given):
    """The whole model in numpy, in double precision, one token at a time."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    tokens, positions, segments = (
        np.asarray(a) for a in (given.tokens, given.positions, given.segments)
    )

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale

    def turn(x, position):
        half = W // 2
        z = x[:half] + 1j * x[half:]
        z = z * np.exp(1j * position * 100.0 ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    def gated(w, x):
        gate = x @ w["w_gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]

    def attend(w, x, b):
        out = np.zeros((S, D))
        q, k, v = (np.einsum("sd,dhk->shk", x, w[n]) for n in ("w_q", "w_k", "w_v"))
        for s, h in np.ndindex(S, H):
            sees = [
                m
                for m in range(S)
                if segments[b, m] == segments[b, s]
                and positions[b, m] <= positions[b, s]
            ]
            query = turn(norm(q[s, h], w["q_norm"]["scale"]), positions[b, s])
            scores = [
                query
                @ turn(norm(k[m, h // 2], w["k_norm"]["scale"]), positions[b, m])
                / np.sqrt(W)
                for m in sees
            ]
            share = np.exp(scores) / np.exp(scores).sum()
            out[s] += share @ v[sees, h // 2] @ w["w_o"][h]
        return out

    def mixture(w, x):
        scores = np.exp(x @ w["scorer"]["w"])
        chosen = np.argsort(-scores)[:2]
        y = gated(w["shared"], x)
        for e in chosen:
            one = {name: stacked[e] for name, stacked in w["experts"].items()}
            y = y + scores[e] / scores[chosen].sum() * gated(one, x)
        return y

    layer = lambda name, block, i: jax.tree.map(lambda w: w[i], params[name][block])
    blocks = [layer("segment_0", "block_0", 0)]
    for i in range(2):
        blocks += [layer("segment_1", "block_0", i), layer("segment_1", "block_1", i)]
    blocks.append(layer("segment_2", "block_0", 0))
    logits = np.zeros((B, S, V))
    for b in range(B):
        x = params["embedding"][tokens[b]]
        for w in blocks:
            normed = norm(x, w["attention_norm"]["scale"])
            x = x + attend(w["attention"], normed, b)
            normed = norm(x, w["feed_forward_norm"]["scale"])
            if "moe" in w:
                x = x + np.stack([mixture(w["moe"], row) for row in normed])
            else:
                x = x + gated(w["feed_forward"], normed)
        logits[b] = norm(x, params["norm"]["scale"]) @ params["embedding"].T
    return logits


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


def test_remat_policies_give_the_same_gradients():
    moe = MoE(
        num_experts=E,
        experts=ExpertFeedForward(d_ff=8),
        dispatch=DenseDispatch(),  # The one that compiles fastest.
    )
    given = inputs(TOKENS, STEPS, np.ones((B, S)))
    grads, compiled = {}, {}
    remats = ("none", "full", "dots", *remat_lib.NAMES, "+".join(remat_lib.NAMES))
    for remat in remats:
        model = DecoderModel(options(num_layers=2, feed_forward=moe, remat=remat))

        def value(params, model=model):
            hidden, _, aux = model.apply(
                params, {"segment_0": {"block_0": {}}}, given, key=None, mode=TRAIN
            )
            total = jnp.mean(jnp.square(model.logits(params, hidden)))
            return total + sum(jnp.sum(one) for one in aux.losses.values())

        params = drawn(model)
        traced = jax.jit(jax.grad(value)).trace(params)
        compiled[remat] = str(traced.jaxpr)
        grads[remat] = named_leaves(traced.lower().compile()(params))
    for remat in remats:
        for name, grad in grads[remat].items():
            np.testing.assert_allclose(
                grad, grads["none"][name], rtol=1e-3, atol=1e-6, err_msg=name
            )
            assert np.abs(grad).max() > 0, name
    dots = {remat: text.count("dot_general") for remat, text in compiled.items()}
    assert dots["none"] < dots["dots"] <= dots["full"]
    for remat in ("attention", "projections", "hidden"):
        assert dots["+".join(remat_lib.NAMES)] < dots[remat] < dots["full"], remat


def test_policies_in_turn_change_no_number():
    """Outputs keep the order of the layers; the parameters lie as before."""
    given = inputs(TOKENS, STEPS, np.ones((B, S)))
    found = {}
    for remat in ("none", "full,none"):
        # Blocks: dense, and twice (dense, MoE).
        model = DecoderModel(options(num_layers=5, remat=remat))
        model.options.feed_forward.dispatch = DenseDispatch()
        params, state = drawn(model), model.init_router_state()

        def value(params, model=model, state=state):
            hidden, seen, aux = model.apply(params, state, given, key=None, mode=TRAIN)
            total = jnp.sum(jnp.sin(hidden))
            return total + sum(map(jnp.sum, aux.losses.values())), (seen, aux)

        found[remat] = jax.jit(jax.grad(value, has_aux=True))(params)
    (want, sums), (got, new) = found.values()
    for name, grad in named_leaves(want).items():
        np.testing.assert_allclose(
            named_leaves(got)[name], grad, rtol=1e-3, atol=1e-5, err_msg=name
        )
    new = named_leaves(new)
    for name, value in named_leaves(sums).items():
        np.testing.assert_allclose(new[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "fields", "want"),
    [
        (3, {}, [((True,), 3, 0, 0)]),
        (3, dict(first_dense=1), [((False,), 1, 0, 0), ((True,), 2, 1, 0)]),
        (4, dict(every=2), [((False, True), 2, 0, 0)]),
        (5, dict(every=2), [((False, True), 2, 0, 0), ((False,), 1, 4, 2)]),
        (
            9,
            dict(first_dense=1, every=3),
            [((False,), 1, 0, 0), ((False, False, True), 2, 1, 0), ((False,), 2, 7, 2)],
        ),
    ],
)
def test_segments(layers, fields, want):
    dense = 8 if fields else 0
    made = options(num_layers=layers, feed_forward=MoE(dense_d_ff=dense, **fields))
    of = lambda moe, *rest: Segment(tuple(map(Kind, moe)), *rest)
    assert segments_of(made) == tuple(of(*one) for one in want)


def test_segments_with_windows():
    """Every other block sees all; what does not repeat is a run of its own."""
    dense, moe = Kind(False, 4), Kind(True, 4)
    every = dict(window=4, full_attention_every=2)
    made = options(num_layers=5, feed_forward=MoE(), **every)
    both = (moe, Kind(True, 0))
    assert segments_of(made) == (Segment(both, 2, 0, 0), Segment((moe,), 1, 4, 4))
    ff = MoE(first_dense=1, dense_d_ff=8)
    made = options(num_layers=5, feed_forward=ff, **every)
    assert made.windows() == (4, 0, 4, 0, 4)
    assert segments_of(made) == (
        Segment((dense,), 1, 0, 0),
        Segment((Kind(True, 0), moe), 2, 1, 0),
    )
    ff = MoE(every=3, dense_d_ff=8)
    made = options(num_layers=6, feed_forward=ff, window=4, full_attention_every=2)
    (only,) = segments_of(made)
    assert [kind.window for kind in only.blocks] == [4, 0, 4, 0, 4, 0]
    assert [kind.moe for kind in only.blocks] == [False, False, True] * 2
    made = options(feed_forward=Dense(d_ff=F), window=3)
    assert segments_of(made) == (Segment((Kind(False, 3),), 6, 0, 0),)


def test_a_dense_model_is_one_segment():
    made = options(feed_forward=Dense(d_ff=F))
    assert segments_of(made) == (Segment((Kind(False),), 6, 0, 0),)
    model = build(made)
    assert isinstance(model, DecoderModel) and model.num_moe_layers == 0
    assert model.init_router_state() == {}


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


@pytest.mark.parametrize(
    ("fields", "mesh", "words"),
    [
        ({}, {}, ""),
        (dict(num_layers=0), {}, "num_layers=0: must be at least 1"),
        (dict(num_heads=3), {}, "d_model=16 is not divisible"),
        (dict(num_kv_heads=3), {}, "num_kv_heads=3"),
        (dict(head_dim=3), {}, "head_dim=3: rotary positions turn pairs"),
        (dict(remat="some"), {}, "remat='some': 'some' is not known"),
        (dict(remat="hidden+dots"), {}, "'dots' is not known"),
        (dict(remat="hidden+attention"), {}, ""),
        # Runs of one, twice two, and one block.
        (dict(remat="hidden+attention,none"), {}, ""),
        (dict(remat="full,some"), {}, "'some' is not known"),
        (dict(remat="full,"), {}, "'' is not known"),
        (dict(remat="full,none,none"), {}, ""),
        (
            dict(remat="full,none,none", feed_forward=Dense(d_ff=8), num_layers=4),
            {},
            "the run of 4 blocks from block 0 on is not a multiple; their number "
            "takes one of [1, 2, 4]",
        ),
        (
            dict(remat="exchanges", feed_forward=Dense(d_ff=8)),
            {},
            "there are no experts, so nothing is exchanged",
        ),
        (dict(remat="exchanges"), {}, ""),
        (dict(dtype="float8"), {}, "dtype='float8'"),
        (dict(num_kv_heads=-1), {}, "must not be negative"),
        (dict(norm="batch"), {}, "norm='batch': must be one of ['layer', 'rms']"),
        (dict(logit_softcap=-1.0), {}, "logit_softcap=-1.0: must not be negative"),
        (dict(mtp=-1), {}, "mtp=-1: must not be negative"),
        (dict(full_attention_every=2), {}, "full_attention_every=2 would be ignored"),
        (dict(window=3, full_attention_every=1), {}, "must be 0, or at least 2"),
        (dict(num_layers=1), {}, "leaves no block for experts"),
        (dict(num_layers=2), {}, "leaves no block for experts"),
        ({}, dict(fsdp=3), "d_model=16 is not divisible by config.mesh.fsdp"),
        (dict(vocab_size=33), dict(tensor=2), "vocab_size=33 is not divisible"),
        (dict(num_kv_heads=1), dict(tensor=2), "num_kv_heads=1 is not divisible"),
    ],
)
def test_problems(fields, mesh, words):
    root = config.Config(mesh=config.MeshConfig(**mesh))
    found = list(options(**fields).problems("config.model", root))
    if words:
        assert any(words in one for one in found), found
    else:
        assert found == []


def test_a_shrunk_model_is_of_the_same_kind():
    big = options(d_model=512, num_heads=32, num_kv_heads=8, head_dim=16, num_layers=30)
    big.feed_forward.selector = TopK(top_k=3)
    small = big.shrunk()
    assert small.num_heads // small.kv_heads == 4
    assert small.feed_forward.selector.top_k == 3 and small.num_layers == 5
    assert segments_of(small)[1].blocks == (Kind(False), Kind(True))
    assert list(small.problems("config.model", config.Config())) == []
    assert big.num_layers == 30 and big.feed_forward.experts.d_ff == F
