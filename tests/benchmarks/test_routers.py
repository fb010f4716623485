"""The table of the routers' comparison, from made-up runs; and its configs."""

import importlib.util
import json
import math
import pathlib

import pytest

import moe_jax
from moe_jax import config
from moe_jax.cli import config_file

ROOT = pathlib.Path(moe_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def routers():
    path = ROOT / "benchmarks" / "routers.py"
    spec = importlib.util.spec_from_file_location("routers_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_config_is_valid_and_differs(routers):
    made = [config_file.load(f"{routers.CONFIG}:{name}") for name in routers.NAMES]
    for one in made:
        config.validate(one)
    routes = [(c.model.feed_forward.selector, c.model.feed_forward.noise) for c in made]
    balances = [c.model.feed_forward.balance for c in made]
    rows = [repr(row) for row in zip(routes, balances, strict=True)]
    assert len(set(rows)) == len(routers.NAMES)
    same = {(c.seed, c.train.steps, c.train.batch_size, repr(c.data)) for c in made}
    assert len(same) == 1, "the same examples in the same order"


def test_intervals_are_students(routers):
    mean, half = routers.interval([1.0, 2.0, 3.0])
    # sd 1, n 3, t(0.975, 2) = 4.3027.
    assert (mean, half) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert routers.interval([5.0]) == (5.0, math.inf)


def test_the_verdict_is_about_pairs(routers):
    first = [1.0, 2.0, 3.0]
    assert routers.verdict([1.1, 2.1, 3.1], first).endswith("worse")
    assert routers.verdict([0.9, 1.91, 2.9], first).endswith("better")
    assert routers.verdict([0.9, 2.1, 3.05], first).endswith("within noise")
    assert routers.verdict([0.1], [9.0]).endswith("within noise"), "one seed"


def run(folder, loss):
    folder.mkdir()
    summary = {"held_out": {"loss": loss}, "drops": 1}
    summary["routing"] = {"max_violation_run": 0.25}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step_ms": 9e9 if n < 20 else 100.0 + n, "max_violation": n / 100}
        | {"experts_per_token": 2.0}
        for n in range(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_the_table(routers, tmp_path):
    found = {"a": [], "b": []}
    for name, losses in (("a", [1.0, 1.1, 1.2]), ("b", [1.5, 1.6, 1.7])):
        for seed, loss in enumerate(losses):
            run(tmp_path / f"{name}{seed}", loss)
            found[name].append(routers.figures(tmp_path / f"{name}{seed}"))
    assert found["a"][0]["step_ms"] == 129.5, "the median without the first twenty"
    assert found["a"][0]["late_violation"] == pytest.approx(0.375)
    lines = routers.table(found)
    assert lines[2] == "| a | 1.1000 ± 0.2484 |  | 0.38 | 0.25 | 2.00 | 3 | 130 |"
    assert lines[3].startswith("| b | 1.6000 ± 0.2484 | +0.5000 ± 0.0000 worse | 0.3")
    assert lines[-1].endswith("3 seeds, 40 steps; median ms per step.")
    few = {name: runs[:1] for name, runs in found.items()}
    assert "Fewer than three seeds" in routers.table(few)[-1]
