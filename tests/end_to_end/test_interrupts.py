"""Runs that are stopped and killed; what goes on is the same run."""

import os
import random
import signal
import time

import pytest

from moe_jax.observe.writers import read_metrics

pytestmark = pytest.mark.slow


def wait_for(child, condition, what):
    """Until it holds; the process must live so long."""
    limit = time.monotonic() + 200
    while not condition():
        assert child.poll() is None, f"ended before {what}: {child.communicate()}"
        assert time.monotonic() < limit, f"no {what}"
        time.sleep(0.002)


def count_lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_signals_save_and_the_run_goes_on(commands, finished, figures, tmp_path):
    argv = commands.train(tmp_path)
    at = 0
    for name in ("SIGINT", "SIGTERM"):
        begun = at
        child = commands.start(argv)
        wait_for(child, lambda begun=begun: count_lines(tmp_path) > begun + 3, "steps")
        child.send_signal(signal.Signals[name])
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0
        assert err == f"{name}: stopping; Ctrl-C stops at once\n"
        at = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
        assert out.splitlines()[-1] == (
            f"{name}: stopped after step {at}, checkpoint saved; the same command "
            "goes on"
        )
        assert (f"going on from step {begun}" in out) == (begun > 0)
        assert begun + 3 < at < 60
        assert not (tmp_path / "summary.json").exists()
    out, _ = commands.run(argv)
    assert f"going on from step {at}" in out
    assert figures(tmp_path) == figures(finished.workdir)
    assert (tmp_path / "summary.json").exists()


def test_killed_runs_go_on(commands, finished, figures, tmp_path):
    """Killed while it compiles, between two steps, and while it saves."""
    rng = random.Random(time.time_ns())
    argv = commands.train(tmp_path)
    saved = tmp_path / "checkpoints"

    def unfinished_save():
        return saved.exists() and any(
            not path.name.isdigit() for path in saved.iterdir()
        )

    few = rng.randint(4, 20)
    moments = {
        "compiling": (lambda: (tmp_path / "config.json").exists(), rng.random()),
        "training": (lambda: count_lines(tmp_path) >= few, 0.02 * rng.random()),
        "saving": (unfinished_save, 0.02 * rng.random()),
    }
    print("moments", few, [secs for _, secs in moments.values()])
    for what, (condition, secs) in moments.items():
        extra = {}
        if what == "compiling":
            extra["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        child = commands.start(argv, **extra)
        wait_for(child, condition, what)
        time.sleep(secs)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        if what == "compiling":
            assert count_lines(tmp_path) == 0
    out, err = commands.run(argv)
    assert "damaged" not in out + err
    assert figures(tmp_path) == figures(finished.workdir)
