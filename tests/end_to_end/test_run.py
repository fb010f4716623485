"""A run from its command to its last file, and what can be done with it."""

import importlib.util
import json

import pytest

from moe_jax import config_json
from moe_jax.cli import config_file
from moe_jax.train import workdir

pytestmark = pytest.mark.slow


def test_files(finished):
    folder = finished.workdir
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "checkpoints",
    }
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(saved) == ["57", "60"], "the two newest"
    (events,) = (folder / "tensorboard").iterdir()
    assert "tfevents" in events.name and events.stat().st_size > 1000
    assert finished.err == ""


def test_resolved_config(finished, commands):
    config = workdir.read_config(str(finished.workdir))
    assert config.data.source.path == str(commands.folder / "text.txt")
    assert config.data.workers == 1
    original = config_file.load(str(commands.tiny))
    assert config.model == original.model
    assert len(config_json.differences(original, config)) == 3


def test_metrics_have_every_step(finished):
    raw = (finished.workdir / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in raw]
    assert [line["step"] for line in lines] == list(range(1, 61))
    names = {"loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second"}
    names |= {"step_ms", "load_max_over_mean", "drops", "skipped", "router_entropy"}
    for line in lines:
        assert names <= line.keys()
    # log.every is 10: there the load of every expert, 2 layers of 4.
    counts = [line["step"] for line in lines if "expert_counts" in line]
    assert counts == [10, 20, 30, 40, 50, 60]
    assert all(line["drops"] == 0 and line["skipped"] is False for line in lines)
    tokens = 8 * 32
    for line in lines[9::10]:
        assert [sum(row) for row in line["expert_counts"]] == [2 * tokens] * 2


def test_the_loss_falls(finished):
    losses = [line["loss"] for line in finished.metrics]
    # log(264) = 5.58 nats is what a uniform guess costs.
    assert 5.0 < losses[0] < 6.5
    assert losses[-1] < 1.5


def test_summary(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    lines = finished.metrics
    assert summary["step"] == 60
    assert summary["losses"] == {"first": lines[0]["loss"], "last": lines[-1]["loss"]}
    assert summary["seconds"] == pytest.approx(sum(x["step_ms"] for x in lines) / 1000)
    assert summary["tokens_per_second"] == pytest.approx(
        60 * 8 * 32 / summary["seconds"]
    )
    assert summary["drops"] == summary["skipped_steps"] == 0
    assert summary["mesh"] == {
        **{"data": 1, "fsdp": 1, "expert": 2},
        **{"context": 1, "tensor": 1},
    }
    assert summary["compile_seconds"] > 0
    assert summary["baselines"] == {}
    assert {"jax", "flax", "optax", "python", "platform"} <= summary["versions"].keys()
    assert 0 < summary["held_out"]["bits_per_byte"] < 2.5


def test_console(finished):
    out = finished.out
    assert "1 process, 2 devices of kind cpu; mesh expert=2" in out
    for step in (10, 20, 30, 40, 50, 60):
        assert f"step {step}/60  loss " in out
    for step in (20, 40, 60):
        assert out.count(f"step {step}: held-out loss ") == 1
    assert "--- sample 1 ---" in out
    assert f"moe-jax eval --workdir={finished.workdir}" in out


def test_training_does_not_import_tensorflow(finished):
    assert "moe_jax.train.loop" in finished.modules, "the hook saw the run"
    heavy = {"tensorflow", "tensorboard"}
    if importlib.util.find_spec("torch") is None:
        heavy.add("torch")  # Where it is installed, tensorboardX imports it.
    assert not heavy & {name.split(".")[0] for name in finished.modules}


def test_eval_gives_the_figures_of_the_summary(finished, commands):
    out, err = commands.run(commands.command("eval", f"--workdir={finished.workdir}"))
    (line,) = out.splitlines()
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert json.loads(line) == {"step": 60} | summary["held_out"]
    assert err == "checkpoint of step 60\n"


def test_eval_of_an_earlier_step_on_another_mesh(finished, commands):
    out, _ = commands.run(
        commands.command(
            "eval",
            f"--workdir={finished.workdir}",
            "--step=57",
            "--mesh=fsdp=2",
            "--max_batches=2",
        )
    )
    found = json.loads(out)
    last = json.loads((finished.workdir / "summary.json").read_text())["held_out"]
    assert found["step"] == 57
    assert found["tokens"] < last["tokens"]
    assert found["loss"] == pytest.approx(last["loss"], rel=0.2)


def test_generate_on_another_mesh_writes_the_same(finished, commands):
    texts = []
    for extra in ([], ["--mesh=tensor=2"]):
        out, err = commands.run(
            commands.command(
                "generate",
                f"--workdir={finished.workdir}",
                "--prompt=the router ",
                "--tokens=24",
                "--temperature=0",
                *extra,
            )
        )
        assert err == "checkpoint of step 60\n"
        texts.append(out)
    assert texts[0].startswith("the router ")
    assert len(texts[0].rstrip("\n")) == len("the router ") + 24
    known = set("the router sends every token two experts and adds what they say\n")
    assert len([c for c in texts[0] if c in known]) > 0.9 * len(texts[0])
    assert texts[0] == texts[1]
