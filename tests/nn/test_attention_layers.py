"""The attention layers against their formulas; with caches and on meshes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import by_formula

from moe_jax import config
from moe_jax.nn import module
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.nn.attention.latent import LatentAttention, LatentSelfAttention
from moe_jax.nn.attention.layer import Attention
from moe_jax.nn.attention.scores import Scores
from moe_jax.nn.rope import LongRope, Rope, YaRN, latent_scale, table
from moe_jax.tree import named_leaves

B, S, D, H, G, W, EPS = 2, 16, 8, 4, 2, 6, 1e-5
POSITIONS = np.array([[*range(9), *range(7)], [*range(12), 0, 1, 2, 3]], np.int32)
SEGMENTS = np.array([[1] * 9 + [2] * 7, [1] * 12 + [0] * 4], np.int32)
SIZES = LatentAttention(query_rank=8, kv_rank=4, nope_dim=6, rope_dim=4, value_dim=5)
LONG = LongRope(
    short_factor=(1.0, 1.5, 2.0),
    long_factor=(2.0, 3.0, 4.0),
    original_length=8,
    short_mscale=1.1,
    long_mscale=1.2,
)
YARN = YaRN(factor=4.0, original_length=8, mscale=0.7, mscale_all_dim=1.0)
LAYERS = {
    "rope": dict(rope=Rope(theta=50.0, fraction=0.7, interleaved=True)),
    "long": dict(rope=Rope(theta=50.0, scaling=LONG)),
    "all": dict(
        qk_norm="projection",
        clip=0.5,
        bias=True,
        output_bias=True,
        window=5,
        sinks=True,
        softcap=1.5,
        rope=Rope(theta=50.0, scaling=YARN),
    ),
    "latent": dict(sizes=SIZES),
    "latent, all": dict(
        sizes=LatentAttention(kv_rank=4, nope_dim=3, rope_dim=6, value_dim=7),
        rope=Rope(theta=50.0, interleaved=True, scaling=YARN),
        window=5,
        sinks=True,
        softcap=1.5,
        output_bias=True,
    ),
}


def made(name, options=None):
    """A layer's template, and what it was made of."""
    given = dict(rope=Rope(theta=50.0)) | LAYERS[name]
    rest = dict(norm_eps=EPS, std=0.5, out_std=0.5, dtype="float64")

    def build(rngs):
        fields = dict(given)
        sizes = fields.pop("sizes", None)
        shape = (G, W) if sizes is None else (sizes,)
        layer = Attention if sizes is None else LatentSelfAttention
        method = options or Scores()
        return layer(D, H, *shape, method, **fields, **rest, rngs=rngs)

    return module.Template(build), given


def weights_of(template, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape) * 0.6
        return jnp.asarray(1 + value if path[-1].key == "scale" else value)

    shapes = jax.eval_shape(template.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def normed(x, scale, axes):
    mean = (x**2).mean(axis=axes, keepdims=True)
    return x / jnp.sqrt(mean + EPS) * scale


def turned(x, rope):
    """(B, S, N, width): each pair of columns by the angles of its position."""
    width = rope.turned(x.shape[-1])
    found = table(rope, x.shape[-1], S)
    pairs = np.arange(width // 2)
    a, b = (
        (2 * pairs, 2 * pairs + 1) if rope.interleaved else (pairs, pairs + len(pairs))
    )
    angles = POSITIONS[..., None, None] * found.frequencies
    cos, sin = np.cos(angles) * found.magnitude, np.sin(angles) * found.magnitude
    first, second = x[..., a], x[..., b]
    x = x.at[..., a].set(first * cos - second * sin)
    return x.at[..., b].set(first * sin + second * cos)


def plain_heads(weights, x, given):
    q, k, v = (jnp.tensordot(x, weights[f"w_{n}"], 1) for n in "qkv")
    if given.get("bias"):
        q, k, v = q + weights["b_q"], k + weights["b_k"], v + weights["b_v"]
    axes = {"head": -1, "projection": (-1, -2)}.get(given.get("qk_norm"))
    if axes:
        q = normed(q, weights["q_norm"]["scale"], axes)
        k = normed(k, weights["k_norm"]["scale"], axes)
    if clip := given.get("clip"):
        q, k, v = (jnp.minimum(jnp.maximum(a, -clip), clip) for a in (q, k, v))
    rope = given["rope"]
    return turned(q, rope) / np.sqrt(W), turned(k, rope), v


def latent_heads(weights, x, given):
    """Equations 37 to 47: latents, what they expand to, one rotary key for all."""
    sizes, rope = given["sizes"], given["rope"]
    if sizes.query_rank:
        latent = normed(x @ weights["w_q_down"], weights["q_norm"]["scale"], -1)
        q = jnp.tensordot(latent, weights["w_q_up"], 1)
    else:
        q = jnp.tensordot(x, weights["w_q"], 1)
    down = x @ weights["w_kv_down"]
    latent = normed(down[..., : sizes.kv_rank], weights["kv_norm"]["scale"], -1)
    key = turned(down[:, :, None, sizes.kv_rank :], rope)
    up = jnp.tensordot(latent, weights["w_kv_up"], 1)
    still = sizes.nope_dim
    q = jnp.concatenate([q[..., :still], turned(q[..., still:], rope)], axis=-1)
    key = jnp.repeat(key, H, axis=2)
    k = jnp.concatenate([up[..., :still], key], axis=-1)
    scale = latent_scale(rope) / np.sqrt(still + sizes.rope_dim)
    return q * scale, k, up[..., still:]


def by_hand(weights, x, given):
    heads = latent_heads if "sizes" in given else plain_heads
    q, k, v = heads(weights, x, given)
    extras = given.get("window", 0), given.get("softcap", 0)
    mixed = by_formula(q, k, v, weights.get("sinks"), SEGMENTS, *extras)
    return jnp.tensordot(mixed, weights["w_o"], 2) + weights.get("b_o", 0)


def results(apply, weights, x):
    """Output, and gradients of x and of all weights, by name."""

    def loss(weights, x):
        out = apply(weights, x)
        return jnp.sum(jnp.sin(3 * out)), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), (grads, d_x) = step(weights, x)
    found = {"out": out, "x": d_x} | named_leaves(grads)
    return {name: np.asarray(a) for name, a in found.items()}


def close(found, wanted, tolerance=1e-11):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = np.linalg.norm(found[name] - value)
        assert error <= tolerance * np.linalg.norm(value), name


def drawn_x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, S, D)))


def applied(template):
    return lambda weights, x: template.bind(weights)(x, POSITIONS, SEGMENTS)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(float64, name):
    template, given = made(name)
    weights, x = weights_of(template), drawn_x()
    wanted = results(functools.partial(by_hand, given=given), weights, x)
    close(results(applied(template), weights, x), wanted)
    for value in wanted.values():
        assert np.abs(value).max() > 0


@pytest.mark.parametrize("name", ["all", "latent, all"])
@pytest.mark.parametrize(
    "sizes", [dict(context=2, tensor=2, fsdp=2), dict(context=4, expert=2)]
)
def test_the_same_on_meshes(float64, axes_mesh, name, sizes):
    template, _ = made(name, Blocked(block=4))
    weights, x = weights_of(template), drawn_x()
    wanted = results(applied(template), weights, x)
    with jax.set_mesh(axes_mesh(**sizes)):
        close(results(applied(template), weights, x), wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_gives_what_the_whole_gives(float64, name):
    """A prefill of 6, then one position at a time, in a cache of the row's length."""
    template, _ = made(name)
    layer = template.bind(weights_of(template))
    x, ones = drawn_x(), jnp.ones((B, S), jnp.int32)
    steps = jnp.broadcast_to(jnp.arange(S), (B, S))
    call = jax.jit(lambda *given: layer(*given))
    wanted, _ = call(x, steps, ones)
    cache, start, found = layer.init_cache(B, S, "float64"), 0, []
    for count in [6] + [1] * (S - 6):
        part = slice(start, start + count)
        given = x[:, part], steps[:, part], ones[:, part], cache, jnp.int32(start)
        out, cache = call(*given)
        found.append(out)
        start += count
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, rtol=1e-10)


def test_a_latent_cache_is_narrow(float64):
    template, _ = made("latent")
    cache = jax.eval_shape(lambda: template.hollow.init_cache(3, 10, "bfloat16"))
    assert cache.latents.shape == (3, 10, 4) and cache.keys.shape == (3, 10, 4)
    plain, _ = made("rope")
    cache = jax.eval_shape(lambda: plain.hollow.init_cache(3, 10, "bfloat16"))
    assert cache.keys.shape == cache.values.shape == (3, 10, G, W)


def test_the_names_and_axes_of_weights(float64):
    names = lambda name: {
        "/".join(k.key for k in path): axes
        for path, axes in jax.tree_util.tree_flatten_with_path(
            made(name)[0].axes, is_leaf=lambda v: isinstance(v, tuple)
        )[0]
    }
    assert names("all") == {
        **{f"w_{n}": ("embed", "heads", None) for n in "qkv"},
        **{f"b_{n}": ("heads", None) for n in "qkv"},
        **{f"{n}_norm/scale": ("heads", None) for n in "qk"},
        "w_o": ("heads", None, "embed"),
        "b_o": ("embed",),
        "sinks": ("heads",),
    }
    assert names("latent") == {
        "w_q_down": ("embed", None),
        "q_norm/scale": (None,),
        "w_q_up": ("embed", "heads", None),
        "w_kv_down": ("embed", None),
        "kv_norm/scale": (None,),
        "w_kv_up": ("embed", "heads", None),
        "w_o": ("heads", None, "embed"),
    }
    assert "w_q" in names("latent, all") and "w_q_up" not in names("latent, all")


def test_problems_of_sizes():
    root = config.Config(mesh=config.MeshConfig(fsdp=2, expert=2))
    problems = lambda **f: list(LatentAttention(**f).problems("config.l", root))
    assert problems() == problems(query_rank=8) == []
    assert problems(rope_dim=0) == ["config.l.rope_dim=0: must be at least 2"]
    (line,) = problems(kv_rank=6)
    assert line == (
        "config.l.kv_rank=6 is not divisible by config.mesh.fsdp * mesh.expert=4"
    )
