"""One run on two processes, its experts spread over both of them."""

import json
import sys

import jax
import numpy as np
import pytest

from moe_jax.cli import config_file, main
from moe_jax.observe import ledger
from moe_jax.observe.writers import read_metrics
from moe_jax.train import loop

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture
def config(commands):
    """What the processes run, for the eight devices of this process."""
    config = config_file.load(f"{commands.tiny}:processes")
    config.data.source.path = str(commands.folder / "text.txt")
    config.data.folder = str(commands.folder / "cache")
    config.data.workers = 1
    config.eval.samples = 0
    config.train.steps = 6
    jax.config.update("jax_disable_most_optimizations", True)
    yield config
    jax.config.update("jax_disable_most_optimizations", False)


def test_two_processes_do_what_one_does(commands, config, tmp_path, capsys):
    two, one = tmp_path / "two", tmp_path / "one"
    launcher = [sys.executable, str(commands.root / "launch" / "local.py")]
    options = ["-n", "2", "--devices-per-process=4", "--timeout=200", "--"]
    argv = commands.train(two, variant="processes")
    out, _ = commands.run([*launcher, *options, *argv])
    found = (
        "2 processes on 1 host (found by flags), 8 devices of kind cpu; mesh expert=8"
    )
    assert f"[0] {found}" in out
    for line in ("step 4/4  loss", "step 4: held-out", "--- sample 1", "done: 4 steps"):
        assert f"[0] {line}" in out and f"[1] {line}" not in out
    assert (two / "summary.json").exists()

    assert loop.train(config, str(one)) == 0
    lines, expected = (read_metrics(f / "metrics.jsonl") for f in (two, one))
    assert [line["step"] for line in lines] == [1, 2, 3, 4], "each written once"
    for name in ("loss", "total_loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(expected[0][name], rel=1e-6)

    # One process goes on with the checkpoint that two have written.
    capsys.readouterr()
    assert loop.train(config, str(two)) == 0
    assert "going on from step 4" in capsys.readouterr().out
    lines = read_metrics(two / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    losses = [[line["loss"] for line in run] for run in (lines, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    held_out = [
        json.loads((f / "summary.json").read_text())["held_out"] for f in (two, one)
    ]
    assert held_out[0]["tokens"] == held_out[1]["tokens"]
    assert held_out[0]["loss"] == pytest.approx(held_out[1]["loss"], rel=1e-4)

    # Whoever read it, each row came once.
    assert ledger.read(two) == ledger.read(one)
    assert main.main(["ledger", f"--workdir={two}"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("6 steps: each row once in each pass\n") and "48 rows" in out
