"""A run on images, from its command to its last picture."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from moe_jax.observe.writers import read_metrics

pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Images:
    """Starts `moe-jax train` on digits, with a model that compiles in seconds."""

    commands: object

    def train(self, workdir, *changes):
        made = {
            "model.num_layers": 1,
            "model.d_model": 32,
            "model.num_heads": 2,
            "model.feed_forward.experts.d_ff": 32,
            "model.feed_forward.shared_d_ff": 32,
            "train.steps": 6,
            "train.batch_size": 32,
            "train.compilation_cache": "",
            "schedule.warmup_steps": 2,
            "checkpoint.every": 3,
            "eval.every": 3,
            "eval.samples": 20,
            "eval.judged": 0,
            "log.every": 2,
            "data.folder": self.commands.folder / "cache",
        }
        return [
            *(sys.executable, "-m", "moe_jax.cli.train"),
            f"--config={self.commands.root / 'configs' / 'dit' / 'digits.py'}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in made.items()),
            *changes,
        ]


@pytest.fixture(scope="module")
def images(commands):
    return Images(commands)


@pytest.fixture(scope="module")
def run(images, commands):
    """The folder of a run that nothing disturbed, and what it printed."""
    folder = commands.folder / "digits"
    changes = ("--config.eval.judged=400", "--config.train.steps=6")
    return folder, commands.run(images.train(folder, *changes))[0]


def test_files_and_figures(run):
    folder, out = run
    pictures = {f"experts_by_{name}.png" for name in ("time", "class", "position")}
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("config.json", "metrics.jsonl", "summary.json", "tensorboard"),
        *("checkpoints", "samples.png"),
        *pictures,
    }
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "grad_norm", "images_per_second", "images", "drops"}
    assert names <= lines[0].keys() and "bits_per_byte" not in lines[0]
    assert all(line["images"] == 32 and line["drops"] == 0 for line in lines)
    assert lines[0]["loss"] == pytest.approx(1.5, abs=0.4)  # Of a network that says 0.
    summary = json.loads((folder / "summary.json").read_text())
    held_out = summary["held_out"]
    assert held_out["images"] == 377 and len(held_out["by_time"]) == 10
    assert held_out["loss"] == pytest.approx(np.mean(held_out["by_time"]))
    judged = summary["samples"]
    assert judged["fd"] > 5 * judged["fd_floor"], "six steps make no digits"
    assert judged["held_out_accuracy"] > 0.95 > 0.5 > judged["accuracy"]
    for words in ("images: 8 x 8 x 1, 10 classes; 1,420 to train on, 377 held out",
                  "step 3: held-out loss ", "What experts are chosen by"):  # fmt: skip
        assert words in out
    grid = Image.open(folder / "samples.png")
    assert grid.mode == "L" and grid.width > 4 * grid.height, "two of each class"


def test_a_run_that_was_cut_goes_on_exactly(run, images, commands, figures):
    folder = commands.folder / "cut"
    commands.run(images.train(folder, "--config.train.steps=3"))
    commands.run(images.train(folder))
    assert figures(folder) == figures(run[0])
    read = lambda where: json.loads((where / "summary.json").read_text())["held_out"]
    assert read(folder) == read(run[0])


def test_eval_and_sample(run, commands):
    folder, _ = run
    out, _ = commands.run(commands.command("eval", f"--workdir={folder}"))
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(out) == {"step": 6} | summary["held_out"]
    flags = (f"--workdir={folder}", "--class=3", "--num=5", "--sampler=ddim")
    more = ("--steps=4", "--guidance=2.0", "--interval=0.3,1.0")
    files = [commands.folder / name for name in ("a.npz", "a.png", "b.npz", "b.png")]

    def sample(npz, png, *changes):
        wanted = (f"--npz={npz}", f"--out={png}", *changes)
        return commands.run(commands.command("sample", *flags, *more, *wanted))[0]

    # At 1, 3/4 and 1/2 both networks; at 1/4 the conditional one alone.
    assert "5 images, 7 evaluations each" in sample(*files[:2])
    assert "5 images, 7 evaluations each" in sample(*files[2:], "--mesh=expert=2")
    one, two = (np.load(files[i]) for i in (0, 2))
    assert one["images"].shape == (5, 8, 8, 1) and set(one["labels"]) == {3}
    np.testing.assert_allclose(one["images"], two["images"], atol=1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--class=10"], "--class=10: the model knows 0 to 9"),
        (["--out=grid.jpg"], "--out=grid.jpg: must end in .png"),
        (["--eta=0.5"], "--eta=0.5: dpmpp has none"),
        (["--interval=0.5"], "--interval=0.5: must be LOW,HIGH"),
        (["--guidance_kind=auto", "--worse_top_k=2"], "fewer experts per token"),
        (["--sampler=ddpm"], "a flow has no table of posteriors"),
        (["--guidance_kind=cfg++", "--guidance=0.5"], "choose DDIM()"),
    ],
)
def test_what_sample_refuses(run, commands, flags, words, tmp_path):
    if "--interval=0.5" in flags or "--guidance_kind=auto" in flags:
        flags = [*flags, "--guidance=3.0"]
    argv = commands.command("sample", f"--workdir={run[0]}", *flags)
    child = commands.start(argv)
    out, err = child.communicate(timeout=250)
    assert child.returncode == 2 and words in err, out + err
    assert "Traceback" not in err
