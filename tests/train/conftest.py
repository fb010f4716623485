"""A tiny experiment for the tests of this folder."""

import pathlib

import jax
import pytest

from moe_jax.cli import config_file

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


@pytest.fixture
def tiny():
    """The config of `end_to_end/tiny.py`, one device."""
    config = config_file.load(str(TINY))
    config.mesh.expert = 1
    config.mesh.data = 1
    return config


@pytest.fixture
def x64():
    """64-bit types while the test runs."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
