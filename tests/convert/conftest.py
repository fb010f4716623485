"""Imports and exports in the process, without flags."""

import dataclasses

import jax
import pytest

from moe_jax.config import MeshConfig
from moe_jax.convert import from_hf, to_hf
from moe_jax.train import workdir

REPLICATED = MeshConfig(data=8)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is compiled here runs for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def bring_in():
    """Imports a folder; returns the lines that were shown."""

    def run(checkpoint, folder, **request):
        request = {"mesh": REPLICATED, **request}
        request = from_hf.Request(str(checkpoint), str(folder), **request)
        source = from_hf.read(request.checkpoint)
        config = from_hf.config_of(source, request)
        config = dataclasses.replace(config)
        config.train.compilation_cache = ""
        lines = []
        from_hf.convert(source, config, request, lines.append)
        return lines

    return run


@pytest.fixture(scope="session")
def bring_out():
    """Exports a workdir; returns the lines that were shown."""

    def run(folder, out, **options):
        lines = []
        config = workdir.read_config(str(folder))
        to_hf.convert(str(folder), str(out), config, say=lines.append, **options)
        return lines

    return run
