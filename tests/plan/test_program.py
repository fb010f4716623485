"""Compiling the step: what is kept of it, and what cannot be compiled."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import pytest

from moe_jax.errors import RunError, UserError
from moe_jax.nn.attention.scores import Scores
from moe_jax.plan import hlo, program, report
from moe_jax.train import setup

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "end_to_end" / "tiny.py"


def test_texts_of_a_step(tpu_step):
    assert tpu_step.text.startswith("HloModule jit_train_step, is_scheduled=true")
    assert "num_partitions=8" in tpu_step.text.split("\n", 1)[0]
    assert tpu_step.buffers.startswith("BufferAssignment:")
    assert "BufferLiveRange:" in tpu_step.live_ranges
    assert tpu_step.out_of_memory == "" and tpu_step.peak_bytes > 0


def test_it_is_the_step_that_train_compiles(tpu_step):
    """Its arguments are the state and the batch, by name, type and shard."""
    module = hlo.parse(tpu_step.text)
    entry = module.computations[module.entry]
    found = [i for i in entry.instructions if i.opcode == "parameter"]
    state = jax.tree.leaves(tpu_step.parts.abstract)
    found.sort(key=lambda i: i.index)
    names = [i.op_name.split(".")[0].split("[")[0] for i in found]
    want = ["state"] * len(state) + ["batch"] * (len(found) - len(state))
    # The compiler gives weights that a loop takes as they are the name of the loop.
    of_loops = [i for i, name in enumerate(names) if name.endswith("/while")]
    paths = jax.tree_util.tree_flatten_with_path(tpu_step.parts.abstract)[0]
    assert all("experts" in str(paths[i][0]) for i in of_loops)
    assert [n for i, n in enumerate(names) if i not in of_loops] == [
        n for i, n in enumerate(want) if i not in of_loops
    ]
    for instruction, leaf in zip(found, state, strict=False):
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert instruction.shapes[0].dims == shard


@pytest.mark.slow
def test_quick_is_the_same_program(tpu_step, tmp_path):
    whole = report.from_program(tpu_step.parts.config, tpu_step).to_json()
    command = (
        f"plan --config={TINY} --config.mesh.data=2 --config.mesh.fsdp=2 --quick "
        f"--topology=v5e:2x4 --json={tmp_path / 'plan.json'}"
    )
    subprocess.run(
        [sys.executable, "-m", "moe_jax.cli.main", *command.split()],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        check=True,
        timeout=200,
    )
    quick = json.loads((tmp_path / "plan.json").read_text())
    for name in ("memory", "allocated_bytes", "executed_flops", "hbm_bytes"):
        assert quick[name] == whole[name], name
    rows = [
        (row["kind"], tuple(row["axes"]), row["count"]) for row in quick["collectives"]
    ]
    assert sorted(rows) == sorted(
        (row["kind"], row["axes"], row["count"]) for row in whole["collectives"]
    )


@pytest.fixture
def failing(monkeypatch):
    """Compilation ends with these words."""

    def set_words(words):
        class Lowered:
            def compile(self, **_):
                raise jax.errors.JaxRuntimeError(words)

        monkeypatch.setattr(setup, "lower_step", lambda parts: Lowered())

    return set_words


def test_failures_of_the_compiler(failing, host, make_config):
    failing("INTERNAL: no such instruction")
    with pytest.raises(RunError, match="failed for cpu:8, 8 chips: INTERNAL: no such"):
        program.compile_program(make_config(expert=2, data=4), host)
    failing("RESOURCE_EXHAUSTED: 99 GB")
    found = program.compile_program(make_config(expert=2, data=4), host)
    assert (found.peak_bytes, found.text) == (None, "")
    assert found.out_of_memory == "RESOURCE_EXHAUSTED: 99 GB"
    with pytest.raises(RunError, match=r"stopped early for cpu:8.*99 GB"):
        report.from_program(make_config(expert=2, data=4), found)


def test_files_are_kept_only_where_asked(
    failing, host, make_config, tmp_path, monkeypatch
):
    failing("RESOURCE_EXHAUSTED")
    config = make_config(expert=2, data=4)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    program.compile_program(config, host)
    assert not any(temporary.iterdir())
    kept = tmp_path / "a" / "b"
    program.compile_program(config, host, dump_folder=str(kept))
    assert kept.is_dir()
    (kept / "file").touch()
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        program.compile_program(config, host, dump_folder=str(kept))
    with pytest.raises(UserError, match="cannot be made"):
        program.compile_program(config, host, dump_folder=str(kept / "file" / "x"))


def test_a_mesh_that_does_not_fit(host, make_config):
    with pytest.raises(UserError, match="needs 16 devices"):
        program.compile_program(make_config(data=8, expert=2), host)


@pytest.mark.slow
def test_a_step_too_large_is_planned_all_the_same(find, compile_step, make_config):
    config = make_config()
    config.model.num_layers, config.model.attention = 1, Scores()
    config.train.batch_size, config.data.sequence_length = 2**14, 512
    compiled = compile_step(find("v5e:1x1"), config=config)
    assert compiled.out_of_memory.startswith("RESOURCE_EXHAUSTED")
    assert compiled.peak_bytes is None
    plan = report.from_program(config, compiled)
    assert plan.fits is False
    # The scores of attention alone: batch, heads, queries and keys, in float32.
    scores = 2**14 * 4 * 512 * 512 * 4
    assert plan.memory.classes["activations"] >= scores > plan.capacity_bytes
    assert sum(plan.memory.classes.values()) == plan.memory.peak_bytes > scores
    assert plan.memory.allocated_bytes >= plan.memory.peak_bytes
    assert plan.memory.classes["parameters"] > 0
    assert plan.step.seconds > 0
