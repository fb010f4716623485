"""The attention's fields of the decoder: cached, counted, and their rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.routing import EVAL
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.nn.attention.cudnn import CuDNN
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.feedforward import Dense
from moe_jax.nn.rope import LongRope, Rope, YaRN

V, D, H, G, W, B, S = 32, 16, 4, 2, 4, 4, 16
SIZES = LatentAttention(query_rank=8, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
YARN = YaRN(factor=4.0, original_length=8, mscale_all_dim=1.0)
KINDS = {
    "gpt_oss": dict(
        num_kv_heads=G,
        window=4,
        full_attention_every=2,
        sinks=True,
        attention_bias=True,
        attention_output_bias=True,
        rope=Rope(scaling=YARN),
    ),
    "deepseek": dict(latent=SIZES, window=5, rope=Rope(interleaved=True, scaling=YARN)),
    "others": dict(
        num_kv_heads=G, qk_norm="projection", clip_qkv=0.5, attention_softcap=2.0
    ),
}


def options(**fields):
    fields = dict(num_layers=2, attention=Blocked(block=4)) | fields
    rest = dict(feed_forward=Dense(d_ff=8), dtype="float32", remat="attention")
    return Decoder(vocab_size=V, d_model=D, num_heads=H, **rest, **fields)


def drawn(model):
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        w = rng.normal(size=leaf.shape) * 0.3
        return jnp.asarray(1 + w if path[-1].key == "scale" else w, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    steps = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    return TokenInputs(tokens=tokens, positions=steps, segments=jnp.ones_like(steps))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_the_logits_of_the_whole(kind):
    model = DecoderModel(options(**KINDS[kind]))
    params, whole = drawn(model), inputs()
    hidden, _, _ = model.apply(params, {}, whole, key=None, mode=EVAL)
    decode = jax.jit(lambda *given: model.decode(params, {}, *given, mode=EVAL))
    cache, start, found = model.init_cache(B, S), 0, []
    for count in [6] + [1] * (S - 6):
        given = jax.tree.map(lambda a, s=slice(start, start + count): a[:, s], whole)
        out, cache = decode(given, cache, jnp.int32(start))
        found.append(np.asarray(out))
        start += count
    np.testing.assert_allclose(np.concatenate(found, axis=1), hidden, atol=2e-5)


def test_flops_of_a_window_by_hand():
    """Of 10 keys a window of 4 leaves 4 - 4 * 4 / 20 = 3.2 on average, else 5."""
    plain = DecoderModel(options()).flops_per_token(10)
    windows = dict(window=4, full_attention_every=2)
    found = DecoderModel(options(**windows)).flops_per_token(10)
    # One of two blocks; scores and mixing, three passes.
    assert plain - found == pytest.approx(3 * 2 * 2 * H * W * (5 - 3.2))


def test_parameters_and_flops_of_latent_attention_by_hand():
    model = DecoderModel(options(latent=SIZES, num_layers=1))
    down = D * 8 + D * (8 + 4)
    up = 8 * H * (6 + 4) + 8 * H * (6 + 5)
    matrices = V * D + down + up + H * 5 * D + 3 * D * 8
    total, active = model.count_parameters()
    assert total == active == matrices + 3 * D + 8 + 8
    # Keys of 10 and values of 5; half of ten keys.
    attention = 3 * 2 * H * (10 + 5) * 5
    assert model.flops_per_token(10) == pytest.approx(6 * matrices + attention)


def test_a_line_for_each_kind_of_call():
    made = options(window=4, full_attention_every=2, attention=CuDNN())
    lines = DecoderModel(made).notes(2, 16)
    assert len(lines) == 2 and "a window of 4" in lines[1]
    assert all("CuDNN attention: Blocked" in line for line in lines)


LONG = LongRope(short_factor=(1.0,) * 2, long_factor=(2.0,) * 2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (KINDS["gpt_oss"], ""),
        (KINDS["deepseek"], ""),
        (KINDS["others"], ""),
        (dict(rope=Rope(scaling=LONG)), ""),
        (dict(qk_norm="heads"), "qk_norm='heads': must be one of ['none', 'head', "),
        (dict(window=-1), "window=-1: must not be negative"),
        (dict(clip_qkv=-1.0), "clip_qkv=-1.0: must not be negative"),
        (dict(latent=SIZES, head_dim=8), "head_dim=8: latent attention has none"),
        (dict(latent=SIZES, num_kv_heads=4), "num_kv_heads=4: latent attention has"),
        (dict(latent=SIZES, qk_norm="head"), "qk_norm='head': latent attention has"),
        (dict(latent=SIZES, clip_qkv=1.0), "clip_qkv=1.0: latent attention has none"),
        (dict(head_dim=8, rope=Rope(scaling=LONG)), "needs one for each of 4 pairs"),
        (dict(attention=CuDNN()), "head_dim=4 is not a multiple of 8"),
        (
            dict(attention=CuDNN(), head_dim=8, sinks=True),
            "attention=CuDNN: it has no softcap and no sinks; set config.model.attent",
        ),
        (dict(attention=CuDNN(), head_dim=8, window=4), ""),
    ],
)
def test_problems(fields, words):
    root = config.Config(model=options(**fields))
    found = list(config.all_problems(root.model, "config.model", root))
    if words:
        assert any(words in one for one in found), found
    else:
        assert found == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_shrunk_model_is_of_the_same_kind(kind):
    big = options(**KINDS[kind])
    small = big.shrunk()
    assert list(small.problems("config.model", config.Config())) == []
    assert (small.latent is None) == (big.latent is None)
    assert bool(small.window) == bool(big.window) and small.sinks == big.sinks
