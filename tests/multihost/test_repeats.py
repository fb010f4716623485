"""Ten runs in a row of four processes: none hangs, and all are the same."""

import time

import pytest

from moe_jax.observe.writers import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.multiprocess, pytest.mark.timeout(3000)]


def test_ten_in_a_row(hosts):
    losses, seconds = set(), []
    for number in range(10):
        folder = hosts.folder / f"again_{number}"
        begin = time.monotonic()
        hosts.train(4, folder, "--config.train.steps=5", "--config.checkpoint.every=2")
        seconds.append(round(time.monotonic() - begin, 1))
        lines = read_metrics(folder / "metrics.jsonl")
        losses.add(tuple(line["loss"] for line in lines))
    print("seconds of each run:", seconds)
    assert len(losses) == 1
