"""Estimates of a small config on meshes of one chip."""

import copy
import math
import pathlib

import jax

from moe_jax.nn.feedforward import Dense
from moe_jax.parallel.mesh import AXES
from moe_jax.plan import analytic
from moe_jax.plan.chips import BY_NAME
from moe_jax.train.optimizers import Adafactor, ParamGroup

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"
CHIP = BY_NAME["v5e"]


def sizes(**mesh):
    return {axis: mesh.get(axis, 1) for axis in AXES}


def estimate(config, slices=1, chip=CHIP, **mesh):
    return analytic.estimate(config, chip, sizes(**mesh), slices)


def changed(config, **values):
    """A copy with `model__remat="dots"` and so on."""
    config = copy.deepcopy(config)
    for path, value in values.items():
        *holders, name = path.split("__")
        owner = config
        for holder in holders:
            owner = getattr(owner, holder)
        setattr(owner, name, value)
    return config


def local_bytes(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


MESHES = [
    dict(data=8),
    dict(fsdp=4, expert=2),
    dict(data=2, fsdp=2, expert=2),
    dict(data=2, expert=2, tensor=2),
    dict(fsdp=4, context=2),
]
KINDS = {
    "adamw": {},
    "average": dict(train__ema_decay=0.9),
    "adafactor": dict(optimizer=Adafactor(min_dim=16)),
    "frozen": dict(optimizer__groups=(ParamGroup(pattern="experts", frozen=True),)),
    "dense": dict(model__feed_forward=Dense(d_ff=64)),
    "mixed": dict(
        model__num_layers=4,
        model__feed_forward__first_dense=1,
        model__feed_forward__dense_d_ff=64,
        model__feed_forward__shared_d_ff=32,
        model__tie_embeddings=False,
    ),
}
