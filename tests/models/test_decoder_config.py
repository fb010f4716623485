"""Segments of blocks, what a config refuses, and the shrunk model."""

import pytest
from decoding import F, options

from moe_jax import config
from moe_jax.models import build
from moe_jax.models.decoder import DecoderModel
from moe_jax.models.decoder_config import segments_of
from moe_jax.models.segments import Kind, Segment
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.feedforward import Dense
from moe_jax.nn.rope import Rope


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
        (dict(rope=Rope(fraction=float("inf"))), {}, ""),  # Rope itself tells of it.
        (dict(num_kv_heads=-1), {}, "num_kv_heads=-1: must be at least 0"),
        (dict(num_layers=2**32), {}, "num_layers=4294967296: must be at most 10,000"),
        (dict(norm="batch"), {}, "norm='batch': must be one of ['layer', 'rms']"),
        (dict(logit_softcap=-1.0), {}, "logit_softcap=-1.0: must not be negative"),
        (dict(mtp=-1), {}, "mtp=-1: must not be negative"),
        (dict(full_attention_every=2), {}, "full_attention_every=2 would be ignored"),
        (dict(window=3, full_attention_every=1), {}, "must be 0, or at least 2"),
        (dict(num_layers=1), {}, "leaves no block for experts"),
        (dict(num_layers=2), {}, "leaves no block for experts"),
        (dict(num_layers=2, remat="full,none"), {}, "leaves no block for experts"),
        (
            dict(remat="full,none", feed_forward=MoE(first_dense=2**40, dense_d_ff=8)),
            {},
            "first_dense=1099511627776 and every=1 leaves no block for experts",
        ),
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
