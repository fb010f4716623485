"""A tiny experiment for the tests of this folder."""

import pathlib

import numpy as np
import pytest

from moe_jax.cli import config_file
from moe_jax.config import MeshConfig
from moe_jax.train.schedules import Constant
from moe_jax.tree import named_leaves

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """All modules of this folder."""


@pytest.fixture(scope="session")
def make_tiny():
    """`make_tiny(expert=2)`: the config of `end_to_end/tiny.py` on that mesh."""

    def make(**mesh):
        config = config_file.load(str(TINY))
        config.mesh = MeshConfig(**{"data": 1, **mesh})
        return config

    return make


@pytest.fixture(scope="session")
def make_sharded(make_tiny):
    """Makes the config of the tests on eight devices: one program for all of them."""

    def make():
        config = make_tiny(data=2, fsdp=2, expert=2)
        config.train.ema_decay = 0.75
        # A program does not depend on the length of the run.
        config.schedule = Constant(warmup_steps=5)
        return config

    return make


@pytest.fixture
def tiny(make_tiny):
    """The config of `end_to_end/tiny.py` on one device."""
    return make_tiny()


@pytest.fixture(scope="session")
def same_bits():
    """Whether two trees have the same leaves, bit for bit, NaNs included."""

    def compare(a, b):
        bits = lambda tree: {
            name: (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes())
            for name, leaf in named_leaves(tree).items()
        }
        return bits(a) == bits(b)

    return compare
