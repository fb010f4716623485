"""The loss in chunks is the loss of the whole logits, and so are its derivatives."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moe_jax.nn import cross_entropy
from moe_jax.nn.cross_entropy import Options, summed
from moe_jax.parallel import rules

B, S, D, V = 8, 6, 8, 12
MESHES = [
    None,
    dict(data=2, tensor=2, expert=2),
    dict(context=2, fsdp=2, tensor=2),
    dict(fsdp=8),
]
NAMES = ("hidden", "matrix", "targets", "weights")
SOFTCAP = 2.0


def plain(z_weight, hidden, matrix, targets, weights, bias=0.0, capped=False):
    """By the definition: all logits at once, (D, V)."""
    logits = hidden @ matrix + bias
    logits = SOFTCAP * jnp.tanh(logits / SOFTCAP) if capped else logits
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jnp.sum((normaliser - chosen) * weights)
    return nll + z_weight * jnp.sum(normaliser**2 * weights), nll


@pytest.fixture
def inputs():
    return draw(V)


def draw(vocab):
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(B, S, D)),
        "matrix": rng.normal(size=(D, vocab)),
        "targets": rng.integers(0, vocab, (B, S)).astype(np.int32),
        "weights": rng.random((B, S)) * (rng.random((B, S)) < 0.8),
    }


def with_gradients(run, given, factors):
    """Both sums, and the gradients of their sum with these factors."""

    def scalar(hidden, matrix, weights):
        sums = run(hidden, matrix, given["targets"], weights)
        return sum(f * s for f, s in zip(factors, sums, strict=True) if f), sums

    floats = [given[name] for name in NAMES if name != "targets"]
    grads, sums = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(*floats)
    return *sums, *grads


WIDE = [
    dict(fsdp=2, expert=2, tensor=2),
    dict(data=2, expert=4),
    dict(fsdp=2, expert=4),
]


@pytest.mark.parametrize(
    ("sizes", "vocab"), [(MESHES[0], V), (MESHES[1], V), (WIDE[0], 256)], ids=str
)
@pytest.mark.parametrize("capped", [False, True])
def test_bias_and_softcap(float64, axes_mesh, sizes, vocab, capped):
    inputs = draw(vocab)
    bias = np.random.default_rng(1).normal(size=vocab)
    targets, weights = inputs["targets"], inputs["weights"]
    options = Options(chunk=8, z_weight=0.25, softcap=SOFTCAP if capped else 0.0)

    def scalar(run):
        def of(hidden, matrix, bias):
            total, nll = run(hidden, matrix, bias)
            return 1.5 * total - 0.7 * nll, (total, nll)

        return jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True)

    given = (inputs["hidden"], inputs["matrix"], bias)
    want = scalar(lambda h, m, b: plain(0.25, h, m, targets, weights, b, capped))
    run = scalar(lambda h, m, b: summed(options, h, m, targets, weights, b))
    mesh = jax.set_mesh(axes_mesh(**sizes)) if sizes else contextlib.nullcontext()
    with mesh:
        found = jax.jit(run)(*given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        found,
        want(*given),
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("chunk", "z_weight", "tied", "factors"),
    [
        (0, 0.0, False, (1.5, 0.0)),
        (8, 0.25, False, (1.5, 0.0)),
        (8, 0.25, True, (1.5, -0.7)),
        (5, 0.0, True, (0.0, 2.0)),
    ],
)
def test_sums_and_all_gradients(
    float64, axes_mesh, inputs, sizes, chunk, z_weight, tied, factors
):
    want = with_gradients(lambda *args: plain(z_weight, *args), inputs, factors)
    axes = ("vocab", "embed") if tied else ("embed", "vocab")
    given = {**inputs, "matrix": inputs["matrix"].T} if tied else inputs
    options = Options(axes=axes, z_weight=z_weight, chunk=chunk)
    run = jax.jit(
        lambda given: with_gradients(
            lambda *args: summed(options, *args), given, factors
        )
    )
    if sizes is None:
        found = run(given)
    else:
        places = [("batch", "sequence", None), axes, *[("batch", "sequence")] * 2]
        mesh = axes_mesh(**sizes)
        with jax.set_mesh(mesh):
            found = run(
                {
                    name: jax.device_put(given[name], rules.sharding(mesh, place))
                    for name, place in zip(NAMES, places, strict=True)
                }
            )
    found = [*found[:3], found[3].T if tied else found[3], found[4]]
    for name, a, b in zip(("total", "nll", *NAMES), found, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=name)


def test_columns_that_a_tpu_can_cut_are_sent(float64, axes_mesh, inputs, monkeypatch):
    """Tiles are 1010 = 2 * 5 * 101, 393 = 3 * 131, a prime, 800: factors up to 7."""
    columns = [cross_entropy._columns(v) for v in (129280, 50257, 151936, 102400)]
    assert columns == [1024 * 128, 400 * 128, 1200 * 128, 102400]
    monkeypatch.setattr(cross_entropy, "platform", lambda: "tpu")
    want = with_gradients(lambda *args: plain(0.0, *args), inputs, (1.5, 0.0))
    run = lambda given: with_gradients(
        lambda *args: summed(Options(), *args), given, (1.5, 0.0)
    )
    with jax.set_mesh(axes_mesh(fsdp=2, expert=2)):
        found = jax.jit(run)(inputs)
        program = jax.make_jaxpr(run)(inputs)
    for name, a, b in zip(("total", "nll", *NAMES), found, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=name)
    sent = [e for e in equations(program.jaxpr) if e.primitive.name == "reduce_scatter"]
    assert [e.outvars[0].aval.shape for e in sent] == [(D // 2, 128), (D // 4, 128)]


@pytest.mark.parametrize("sizes", WIDE, ids=str)
@pytest.mark.parametrize(
    ("chunk", "z_weight", "tied"), [(0, 0.0, False), (2, 0.25, True)]
)
def test_a_wide_vocabulary_is_split_and_tokens_are_gathered(
    float64, axes_mesh, sizes, chunk, z_weight, tied
):
    given = draw(256)
    want = with_gradients(lambda *args: plain(z_weight, *args), given, (1.5, -0.7))
    axes = ("vocab", "embed") if tied else ("embed", "vocab")
    turned = {**given, "matrix": given["matrix"].T} if tied else given
    options = Options(axes=axes, z_weight=z_weight, chunk=chunk)
    run = lambda given: with_gradients(
        lambda *args: summed(options, *args), given, (1.5, -0.7)
    )
    with jax.set_mesh(axes_mesh(**sizes)):
        found = jax.jit(run)(turned)
        names = [e.primitive.name for e in equations(jax.make_jaxpr(run)(turned).jaxpr)]
    assert "all_to_all" in names
    found = [*found[:3], found[3].T if tied else found[3], found[4]]
    for name, a, b in zip(("total", "nll", *NAMES), found, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("vocab", "tokens", "found"),
    [(32000, 4096, "fsdp"), (32000, 6000, None), (32002, 4096, None)],
)
def test_tokens_are_gathered_where_that_sends_less(axes_mesh, vocab, tokens, found):
    """Of fsdp 4: where T < V * 3 / 16, and V can be split."""
    seen = []

    def body(x):
        seen.append(cross_entropy._across(("fsdp", "expert"), tokens, vocab))
        return x

    mesh = axes_mesh(fsdp=4, expert=2)
    spec = jax.sharding.PartitionSpec()
    with jax.set_mesh(mesh):
        jax.make_jaxpr(jax.shard_map(body, in_specs=spec, out_specs=spec))(1.0)
    assert seen[-1] == found


def test_by_hand(float64):
    logits = np.random.default_rng(0).normal(size=(2, 3, V)) * 3
    targets = np.array([[0, 4, 2], [1, 11, 3]], np.int32)
    weights = np.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    _, nll = summed(Options(), logits, np.eye(V), targets, weights)
    want = 0.0
    for b, s in np.ndindex(2, 3):
        powers = np.exp(logits[b, s])
        want -= weights[b, s] * np.log(powers[targets[b, s]] / powers.sum())
    np.testing.assert_allclose(nll, want, rtol=1e-12)


def test_large_logits_do_not_overflow():
    ones = jnp.ones((1, 1))
    run = lambda h: summed(Options(), h, jnp.eye(2), jnp.array([[1]]), ones)[0]
    value, grad = jax.value_and_grad(run)(jnp.array([[[1e4, 0.0]]]))
    np.testing.assert_allclose(value, 1e4)
    np.testing.assert_allclose(grad, [[[1.0, -1.0]]])


def equations(jaxpr):
    """All equations, those inside of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_work_and_memory(inputs):
    """Evaluation has one product, a derivative three, and no logits are whole."""
    given = [inputs[name] for name in NAMES]
    run = lambda *args: summed(Options(chunk=8), *args)[0]
    for traced, products in ((run, 1), (jax.grad(run, argnums=(0, 1)), 3)):
        found = list(equations(jax.make_jaxpr(traced)(*given).jaxpr))
        assert [e.primitive.name for e in found].count("dot_general") == products
        sizes = [v.aval.size for e in found for v in e.outvars]
        assert max(sizes) < B * S * V


@pytest.mark.parametrize("sizes", [dict(fsdp=2, expert=4), dict(fsdp=8)], ids=str)
def test_the_matrix_is_gathered_once_in_the_type_of_the_computation(
    axes_mesh, inputs, sizes
):
    given = {n: a.astype(np.float32) for n, a in inputs.items() if n != "targets"}
    given["hidden"] = given["hidden"].astype(jnp.bfloat16)
    run = lambda h, m, w: summed(Options(chunk=8), h, m, inputs["targets"], w)[0]
    with jax.set_mesh(axes_mesh(**sizes)):
        program = jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(*given.values())
    (body,) = (e for e in program.jaxpr.eqns if e.primitive.name == "shard_map")
    outside = {e.primitive.name: e for e in body.params["jaxpr"].eqns}
    for name in ("all_gather", "reduce_scatter"):
        assert [e.primitive.name for e in equations(program.jaxpr)].count(name) == 2
        assert outside[name].outvars[0].aval.dtype == jnp.bfloat16


def test_a_chunk_is_bounded_by_the_gradient_of_the_matrix():
    assert cross_entropy.chunk_of(4096, 32000) == 4096
    assert cross_entropy.chunk_of(2048, 102400) == 2048
    # Of a small model all that 16 MiB hold.
    assert cross_entropy.chunk_of(128, 264) == 2**22 // 264
