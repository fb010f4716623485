"""Inputs that no one should have written: limits, and what counts as a clear error."""

import contextlib
import io
import resource

import pytest

from moe_jax.cli import common
from moe_jax.errors import RunError, UserError

_ROOM = 3 << 30


@pytest.fixture(autouse=True)
def little_memory():
    """A size that a file claims must not become an allocation."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="session")
def clear():
    """`clear(function)`: what it returns, or None after an error made for people."""

    def run(body, *more):
        try:
            return body()
        except (UserError, RunError, *more) as error:
            assert str(error).strip() and "Traceback" not in str(error)
            return None

    return run


@pytest.fixture(scope="session")
def command():
    """`command(main, define_flags, argv)`: the status, which must be 0 or 2."""

    def run(main, define_flags, argv):
        out = io.StringIO()
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            status = common.execute(main, define_flags, argv, "fuzz")
        said = out.getvalue()
        assert "Traceback" not in said, said
        assert status in (0, 2), said
        assert status == 0 or "moe-jax fuzz: error: " in said
        return status

    return run
