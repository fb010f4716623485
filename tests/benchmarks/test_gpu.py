"""The script for GPUs: its processes and files, and what it takes for exact."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    import gpu

    return gpu


def with_part(monkeypatch, *rows):
    module = types.SimpleNamespace(measure=lambda sizes: iter(rows))
    monkeypatch.setitem(sys.modules, "gpu_parts.layer", module)


def test_rows_are_printed_and_kept(script, monkeypatch, tmp_path, capsys):
    with_part(monkeypatch, {"rows": "lists", "ms": 1.23456}, {"equal": True})
    assert script.measure("layer", tmp_path, script.common.TINY)
    assert "rows=lists  ms=1.235" in capsys.readouterr().out
    found = json.loads((tmp_path / "layer.json").read_text())
    assert found["rows"] == [{"rows": "lists", "ms": 1.23456}, {"equal": True}]
    assert found["sizes"]["tokens"] == 256


def test_a_kernel_that_is_not_exact_fails_the_part(script, monkeypatch, tmp_path):
    with_part(monkeypatch, {"equal": False}, {"equal": True})
    assert not script.measure("layer", tmp_path, script.common.TINY)


def test_one_failure_does_not_keep_the_others(script, monkeypatch, tmp_path, capsys):
    started = []

    def run(command, env, timeout, check):
        started.append(command[2])
        assert str(FOLDER.parent) in env["PYTHONPATH"]
        if command[2] == "kernels":
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=int(command[2] == "layer"))

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={tmp_path}", "--tiny"])
    assert script.main() == 1
    assert started == ["kernels", "layer", "step", "torch"]
    out = capsys.readouterr().out
    assert "took more than 150 s" in out and "failed: kernels, layer" in out


def test_unknown_parts_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "all"])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2 and "no such part: ['all']" in capsys.readouterr().err


def test_errors_and_work(script):
    common = script.common
    assert common.error([1.0, -4.0], [1.0, -2.0]) == 1.0
    assert common.error([], []) == 0.0
    assert np.isnan(common.error([np.nan, 0.0], [0.0, 0.0]))
    # 16384 * 8 rows meet three matrices of 2048 x 1024, each three times.
    assert common.Sizes().layer_flops == 18 * 131072 * 2048 * 1024
    assert common.speed(2e12, 1.0, 4e15) == {"tflops": 2000.0, "of_dense": 0.5}
    assert common.drawn(100, 8).sum() == 100


def test_a_wrong_product_is_seen(script, monkeypatch):
    """The kernels in the interpreter pass; with a fault they do not."""
    from gpu_parts import kernels

    from moe_jax.kernels import grouped_gpu

    limit, counts = script.common.TOLERANCE["float32"], [3, 0, 700, 200]
    assert max(kernels.errors("float32", counts).values()) <= limit
    kernels._differentiated.clear_cache()
    right = grouped_gpu.tgmm
    wrong = lambda x, y, sizes, **other: right(x, y, sizes - 1, **other)
    monkeypatch.setattr(grouped_gpu, "tgmm", wrong)
    found = kernels.errors("float32", counts)
    kernels._differentiated.clear_cache()
    assert found["value"] <= limit and not found["of_w"] <= limit
