"""Whole runs in this process: one compilation, bad steps, resuming, warm start."""

import dataclasses
import json
import logging
import random
import re

import jax
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli import common
from moe_jax.config import MeshConfig
from moe_jax.data import pipeline
from moe_jax.errors import RunError, UserError
from moe_jax.infer import load
from moe_jax.observe.writers import read_metrics
from moe_jax.train import loop, restore, setup

STEPS = 6


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    rng = random.Random(0)
    words = "the router sends every token to two experts".split()
    lines = (" ".join(rng.choices(words, k=8)) for _ in range(300))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def make_config(make_sharded, text_file):
    def make(**train):
        config = make_sharded()
        config.data.source.path = str(text_file)
        config.data.folder = str(text_file.parent / "cache")
        config.train.steps = STEPS
        config.eval.every, config.eval.samples = 4, 0
        config.log.every = 2
        for name, value in train.items():
            setattr(config.train, name, value)
        return config

    return make


@dataclasses.dataclass
class Finished:
    folder: str
    status: int
    compilations: list[str]


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A run of six steps with an evaluation and two checkpoints on the way."""
    folder = str(tmp_path_factory.mktemp("run"))
    messages, logger = _Messages(), logging.getLogger("jax")
    logger.addHandler(messages)
    jax.config.update("jax_log_compiles", True)
    try:
        status = loop.train(make_config(), folder)
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.removeHandler(messages)
    pattern = r"^Compiling (jit\()?train_step\b"
    found = [text for text in messages.texts if re.match(pattern, text)]
    assert any("Compiling" in text for text in messages.texts)
    return Finished(folder, status, found)


def lines(folder):
    return read_metrics(f"{folder}/metrics.jsonl")


@pytest.mark.slow
def test_the_step_is_compiled_once(finished):
    assert finished.status == 0
    assert [line["step"] for line in lines(finished.folder)] == list(range(1, 7))
    assert len(finished.compilations) == 1, finished.compilations


def bad_steps(monkeypatch, *bad):
    """Gives one weight of the batches of these steps the value inf."""
    original = pipeline.TextData.train_batches

    def batches(self, **options):
        for step, batch in enumerate(
            original(self, **options), options["start_step"] + 1
        ):
            if step in bad:
                batch["weights"] = batch["weights"].copy()
                batch["weights"][0, 0] = np.inf
            yield batch

    monkeypatch.setattr(pipeline.TextData, "train_batches", batches)


def test_bad_steps_are_skipped_and_counted(make_config, tmp_path, monkeypatch, capsys):
    bad_steps(monkeypatch, 2, 4, 5)
    assert loop.train(make_config(max_skipped=3), str(tmp_path)) == 0
    found = lines(tmp_path)
    assert [n for n, line in enumerate(found, 1) if line["skipped"]] == [2, 4, 5]
    assert found[1]["loss"] is None, "JSON has no NaN"
    assert np.isfinite(found[5]["loss"])
    assert "step 4: not finite, skipped; nothing was changed" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_steps"] == 3


def test_too_many_bad_steps_end_the_run(make_config, tmp_path, monkeypatch):
    bad_steps(monkeypatch, 1, 3, 4)
    with pytest.raises(RunError, match="step 4: 2 steps in a row were not finite"):
        loop.train(make_config(max_skipped=2), str(tmp_path))


def test_policy_stop_ends_at_the_first_bad_step(
    make_config, tmp_path, monkeypatch, capsys
):
    bad_steps(monkeypatch, 5)
    config = make_config(nan_policy="stop")
    main = lambda: loop.train(config, str(tmp_path))
    assert common.execute(main, lambda: None, [], "train") == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(
        "moe-jax train: step 5: the loss or a gradient is not finite"
    )
    assert len(lines(tmp_path)) == 5
    found = Checkpoints(f"{tmp_path}/checkpoints", config.checkpoint, read_only=True)
    assert found.steps() == [3]


def whole_state(folder, config):
    """All of the newest checkpoint, the optimizer's state too."""
    checkpoints = Checkpoints(
        f"{folder}/checkpoints", config.checkpoint, read_only=True
    )
    found = checkpoints.restore(setup.make_parts(config).abstract)
    checkpoints.close()
    return found.state


def test_scoring_reads_what_it_needs_and_no_more(finished, make_config, same_bits):
    whole = whole_state(finished.folder, make_config())
    loaded = load.load(finished.folder, make_config()).state
    assert int(loaded.step) == STEPS
    assert same_bits(loaded.eval_params, whole.ema)
    assert same_bits(loaded.router_state, whole.router_state)
    assert loaded.opt_state is None and loaded.params == {}
    config = make_config(ema_decay=0.0)
    with pytest.raises(UserError, match="does not fit"):  # Its leaves are others.
        whole_state(finished.folder, config)
    assert same_bits(load.load(finished.folder, config).state.params, whole.params)


def test_a_resumed_run_on_another_mesh_has_the_same_bits(
    finished, make_config, same_bits
):
    original = whole_state(finished.folder, make_config())
    assert int(original.step) == STEPS
    config = make_config()
    for mesh in (
        MeshConfig(data=1, fsdp=2, expert=4),
        MeshConfig(data=4, tensor=2),
    ):
        config.mesh = mesh
        parts = setup.make_parts(config)
        checkpoints = Checkpoints(f"{finished.folder}/checkpoints", config.checkpoint)
        state, notes, _ = restore.begin(parts, pipeline.prepare(config), checkpoints)
        checkpoints.close()
        assert notes == ["going on from step 6"]
        assert same_bits(state, original)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        assert places == parts.shardings


def test_other_text_is_refused(finished, make_config, tmp_path):
    (tmp_path / "text.txt").write_text("something else entirely\n" * 99)
    config = make_config()
    config.data.source.path = str(tmp_path / "text.txt")
    checkpoints = Checkpoints(f"{finished.folder}/checkpoints", config.checkpoint)
    with pytest.raises(UserError, match="the text is not the one this run was"):
        restore.begin(setup.make_parts(config), pipeline.prepare(config), checkpoints)
    checkpoints.close()


def test_warm_start_takes_the_model_only(finished, make_config, tmp_path, same_bits):
    original = whole_state(finished.folder, make_config())
    config = make_config(warm_start=finished.folder)
    parts = setup.make_parts(config)
    checkpoints = Checkpoints(str(tmp_path), config.checkpoint)
    state, notes, _ = restore.begin(parts, pipeline.prepare(config), checkpoints)
    checkpoints.close()
    assert notes == [f"parameters from {finished.folder}"]
    assert int(state.step) == 0
    assert same_bits(state.params, original.params)
    assert same_bits(state.ema, original.params), "the average begins at them"
    fresh = setup.fresh_state(parts)
    assert same_bits(state.opt_state, fresh.opt_state)
    assert same_bits(state.router_state, original.router_state)
    assert not same_bits(fresh.params, original.params)
    assert not same_bits(fresh.router_state, original.router_state)
    assert jax.tree.map(lambda a: a.sharding, state) == parts.shardings


def test_warm_start_without_the_bias_says_so(finished, make_config, tmp_path):
    config = make_config(warm_start=finished.folder)
    config.model.feed_forward.balance.bias_rate = 0.0
    checkpoints = Checkpoints(str(tmp_path), config.checkpoint)
    parts = setup.make_parts(config)
    state, (note,), _ = restore.begin(parts, pipeline.prepare(config), checkpoints)
    checkpoints.close()
    assert "its router state is another, so not that" in note
    assert jax.tree.leaves(state.router_state) == []


def test_a_model_without_a_text_begins_with_any(make_config, tmp_path):
    """As an import leaves it."""
    config = make_config()
    parts, data = setup.make_parts(config), pipeline.prepare(config)
    checkpoints = Checkpoints(str(tmp_path), config.checkpoint)
    checkpoints.save(0, setup.fresh_state(parts), {"step": 0}, force=True)
    state, notes, _ = restore.begin(parts, data, checkpoints)
    checkpoints.close()
    assert int(state.step) == 0 and notes == ["going on from step 0"]


def test_warm_start_needs_a_run_of_the_same_shapes(finished, make_config, tmp_path):
    for source, message in (
        (str(tmp_path), "no config.json there"),
        (finished.folder, "does not fit this config"),
    ):
        config = make_config(warm_start=source)
        config.model.feed_forward.experts.d_ff = 64
        checkpoints = Checkpoints(str(tmp_path / "new"), config.checkpoint)
        with pytest.raises(UserError, match=message):
            restore.begin(setup.make_parts(config), None, checkpoints)
        checkpoints.close()


def test_a_finished_run_only_ends_again(finished, make_config, capsys):
    summary = lambda: json.loads(open(f"{finished.folder}/summary.json").read())
    before, routing = lines(finished.folder), summary()["routing"]
    assert routing["recent_steps"] == STEPS
    assert routing["max_violation_run"] == before[-1]["max_violation_run"]
    assert loop.train(make_config(), finished.folder) == 0
    assert lines(finished.folder) == before
    # The counts of the run came back with the checkpoint.
    again = summary()["routing"]
    assert again["max_violation_run"] == routing["max_violation_run"] > 0
    assert "recent_steps" not in again, "this process took no step"
    assert "going on from step 6" in capsys.readouterr().out
