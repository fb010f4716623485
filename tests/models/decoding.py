"""A small decoder of both kinds of blocks, its inputs, and weights by numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.nn.rope import Rope

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


RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, S))
STEPS = np.tile(np.arange(S), (B, 1))
PACKED = inputs(
    TOKENS,
    [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], list(range(12))],
    [[1] * 4 + [2] * 5 + [0] * 3, [1] * 12],
)
