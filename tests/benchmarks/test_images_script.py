"""The table of the image models' comparison, from made-up runs; and its configs."""

import importlib.util
import json
import pathlib
import sys

import pytest

import moe_jax
from moe_jax import config, models
from moe_jax.cli import config_file

ROOT = pathlib.Path(moe_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(
            "images_benchmark", folder / "images.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_every_variant_is_valid_and_costs_the_same(script):
    active = {}
    for name in script.NAMES:
        made = config_file.load(f"{script.CONFIG}:{name}")
        made.data.source.images, made.data.source.labels = "images.gz", "labels.gz"
        config.validate(made)
        active[name] = models.build(made.model).count_parameters()[1]
    # Routers add a matrix (D, E) a block, biases differ: less than one in a hundred.
    assert max(active.values()) < 1.01 * min(active.values())


def run(folder, loss, fd):
    folder.mkdir()
    summary = {"held_out": {"loss": loss, "by_time": [loss, 2 * loss]}}
    summary["samples"] = {"fd": fd, "fd_floor": 0.5, "accuracy": 0.75}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"step_ms": 9e9 if n < 20 else 100.0} for n in range(40)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_table(script, tmp_path):
    found = {
        name: [
            script.figures(run(tmp_path / f"{name}{seed}", loss + seed / 10, fd + seed))
            for seed in range(3)
        ]
        for name, loss, fd in (("dense", 1.0, 3.0), ("dit_moe", 0.9, 3.0))
    }
    lines = script.table(found)
    assert lines[2].startswith("| dense | 1.1000 ± 0.2484 |  | 4.0000 ± 2.4841 |  |")
    assert "| -0.1000 ± 0.0000 better |" in lines[3]
    assert "| +0.0000 ± 0.0000 within noise | 75.0% | 100 |" in lines[3]
    assert "3 seeds, 40 steps. FD of real images: 0.500." in lines[4]
    # Student, 2 degrees of freedom: 4.303 s / sqrt(3), with s of 0.1 and 0.2.
    assert lines[-1] == "| dit_moe | 1.0000 ± 0.2484 | 2.0000 ± 0.4968 |"
