"""The same config on 1, 2 and 4 processes, its experts over all of them."""

import json
import pathlib

import numpy as np
import pytest

from moe_jax.observe.writers import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.multiprocess, pytest.mark.timeout(3000)]

ROOT = pathlib.Path(__file__).parents[2]
COUNTS = (1, 2, 4)
CLOCK = {"step_ms", "tokens_per_second", "images_per_second", "mfu"}
DIGITS = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.feed_forward.experts.d_ff": 32,
    "model.feed_forward.shared_d_ff": 32,
    "train.steps": 4,
    "train.batch_size": 32,
    "train.compilation_cache": "",
    "train.ledger": True,
    "schedule.warmup_steps": 2,
    "checkpoint.every": 2,
    "eval.every": 2,
    "eval.samples": 20,
    "eval.judged": 400,
    "log.every": 1,
    "mesh.expert": 4,
    "data.folder": "cache",
}


def figures(folder):
    """All of a run that is no clock: a dict a step, and the summary's parts."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [{n: v for n, v in line.items() if n not in CLOCK} for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    return steps, {name: summary.get(name) for name in ("held_out", "routing", "step")}


def assert_near(got, want, rtol):
    """Whole numbers and lists of them exactly, others within `rtol`."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, dict):
            assert_near(got[name], value, rtol)
        elif isinstance(value, float):
            # A gradient of a term that is zero but for rounding has no digits.
            np.testing.assert_allclose(got[name], value, rtol, 1e-12, err_msg=name)
        else:
            assert got[name] == value, name


def assert_written_once(folder, steps, extra=()):
    found = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "ledger"}
    assert found == {*wanted, *extra}
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "float64"])
def text_runs(hosts, request):
    """Folders of twenty steps on 1, 2 and 4 processes."""
    name = "f64" if request.param else "f32"
    folders = {}
    for count in COUNTS:
        folders[count] = hosts.folder / f"parity_{name}_{count}"
        changes = ("--config.train.steps=20", "--config.eval.every=10",
                   "--config.checkpoint.every=10")  # fmt: skip
        hosts.train(
            count, folders[count], *changes, config="mixed", float64=request.param
        )
    return folders, request.param


def test_text(hosts, text_runs):
    folders, float64 = text_runs
    steps, summary = figures(folders[1])
    assert len(steps) == 20 and summary["held_out"]["tokens"] > 50
    for count in COUNTS[1:]:
        other, other_summary = figures(folders[count])
        first = abs(other[0]["loss"] / steps[0]["loss"] - 1)
        worst = max(
            abs(a["loss"] / b["loss"] - 1) for a, b in zip(other, steps, strict=True)
        )
        print(f"{count} processes, float64={float64}: losses {first:.1e}, {worst:.1e}")
        rtol = 1e-8 if float64 else 1e-5
        assert first <= (1e-12 if float64 else 1e-6)
        for got, want in zip(other, steps, strict=True):
            assert_near(got, want, rtol)
        assert_near(other_summary, summary, rtol)
        assert_written_once(folders[count], 20)


def test_checkpoints_of_text(hosts, text_runs):
    """What four processes saved, one restores, and the other way round."""
    folders, float64 = text_runs
    if not float64:
        pytest.skip("once is enough")
    hashes = {
        (count, by): hosts.hashes(by, folders[count], 4, float64=True)
        for count in (1, 4)
        for by in (1, 4)
    }
    for count in (1, 4):
        assert hashes[count, 1] == hashes[count, 4]
    same = sum(hashes[1, 1][name] == hashes[4, 1][name] for name in hashes[1, 1])
    print(f"{same} of {len(hashes[1, 1])} arrays equal bit for bit over processes")


def test_commands_on_text(hosts, text_runs):
    folders, float64 = text_runs
    if float64:
        pytest.skip("once is enough")
    workdir = f"--workdir={folders[4]}"
    scores, texts = [], []
    for count in COUNTS:
        scores.append(json.loads(hosts.command(count, "eval", workdir)[-1]))
        flags = ("--prompt=the ro", "--tokens=16", "--seed=3")
        texts.append(hosts.command(count, "generate", workdir, *flags))
    assert scores[0] == scores[1] == scores[2]
    summary = figures(folders[4])[1]["held_out"]
    assert scores[0]["loss"] == pytest.approx(summary["loss"], rel=1e-6)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] == "checkpoint of step 20" and texts[0][1].startswith("the ro")


@pytest.fixture(scope="module")
def image_runs(hosts):
    config = f"--config={ROOT / 'configs' / 'dit' / 'digits.py'}"
    folders = {}
    for count in COUNTS:
        folders[count] = hosts.folder / f"digits_{count}"
        changes = (f"--config.{name}={value}" for name, value in DIGITS.items())
        workdir = f"--workdir={folders[count]}"
        hosts.command(count, "train", config, workdir, *changes)
    return folders


def test_images(hosts, image_runs):
    steps, summary = figures(image_runs[1])
    pictures = {f"experts_by_{name}.png" for name in ("time", "class", "position")}
    for count in COUNTS[1:]:
        other, other_summary = figures(image_runs[count])
        assert abs(other[0]["loss"] / steps[0]["loss"] - 1) <= 1e-6
        for got, want in zip(other, steps, strict=True):
            assert_near(got, want, 1e-4)
        for name in ("held_out", "routing"):
            got, want = (s[name] for s in (other_summary, summary))
            for key, value in want.items():
                np.testing.assert_allclose(got[key], value, 1e-4, err_msg=key)
        folder = image_runs[count]
        assert_written_once(folder, 4, {"samples.png", "tensorboard", *pictures})
        (last,) = hosts.command(1, "ledger", f"--workdir={folder}")[-1:]
        assert last == "4 steps: each row once in each pass"


def test_commands_on_images(hosts, image_runs):
    workdir = f"--workdir={image_runs[4]}"
    scores, images = [], []
    for count in (1, 4):
        scores.append(json.loads(hosts.command(count, "eval", workdir)[-1]))
        npz = hosts.folder / f"{count}.npz"
        flags = ("--num=6", "--steps=3", f"--npz={npz}", "--out=")
        hosts.command(count, "sample", workdir, *flags)
        images.append(np.load(npz)["images"])
    assert scores[0].keys() == scores[1].keys()
    for name, value in scores[0].items():
        np.testing.assert_allclose(scores[1][name], value, 1e-5, err_msg=name)
    np.testing.assert_allclose(*images, atol=1e-5)
