"""Runs of several processes that a fault strikes, through launch/local.py."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.observe.writers import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
HOOK = pathlib.Path(__file__).with_name("hook")
TINY = pathlib.Path(__file__).with_name("tiny_run.py")
LOCAL = ROOT / "launch" / "local.py"
_LEFT_OUT = ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES")
# What a run leaves in metrics.jsonl, without times.
_FIGURES = ("step", "loss", "total_loss", "grad_norm", "learning_rate", "drops")


@dataclasses.dataclass
class Ended:
    """A run that has ended.

    Attributes:
      status: of the launcher.
      lines: of the output, each with the time at which it came.
      struck: when the fault struck last, or 0.
    """

    status: int
    lines: list[tuple[float, str]]
    struck: float

    @property
    def output(self):
        return "".join(line for _, line in self.lines)

    def seconds_to(self, text):
        """From the fault to the first line after it that holds the text."""
        for at, line in self.lines:
            if text in line and at > self.struck:
                return at - self.struck
        raise AssertionError(f"no {text!r} after the fault:\n{self.output}")


@dataclasses.dataclass
class Runs:
    """Starts runs on one text, with one cache of compiled programs.

    Attributes:
      folder: of all of them.
      slack: how many times longer than on a free machine anything may take.
    """

    folder: pathlib.Path
    slack: float = float(os.environ.get("FAULTS_SLACK", "2"))

    def start(self, workdir, *changes, fault=None, processes=2, options=(), env=None):
        """The launcher of a run, on its way."""
        found = {k: v for k, v in os.environ.items() if k not in _LEFT_OUT}
        found |= {
            "PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "MOE_JAX_START_SECS": "60",
            "MOE_JAX_HEARTBEAT_SECS": "30",
        }
        faults = fault if isinstance(fault, list) else [fault] if fault else []
        marks = {"process": 1, "once": f"{workdir}.fault"}
        found["FAULT"] = json.dumps([marks | fault for fault in faults])
        launcher = [sys.executable, str(LOCAL), "-n", str(processes)]
        launcher += ["--devices-per-process=1", "--backoff=0.1", "--grace=3"]
        command = [sys.executable, "-m", "moe_jax.cli.train"]
        command += [f"--config={TINY}:{processes}", f"--workdir={workdir}"]
        command += [f"--config.data.source.path={self.folder / 'text.txt'}"]
        command += [f"--config.data.folder={self.folder / 'cache'}"]
        command += ["--config.data.workers=1", *changes]
        return subprocess.Popen(
            [*launcher, *options, "--", *command],
            env=found | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, child, workdir, timeout=140):
        """Waits for its end; it must come."""
        timer = threading.Timer(
            timeout * self.slack, child.kill
        )  # Its children go with it.
        timer.start()
        lines = [(time.time(), line) for line in child.stdout]
        status = child.wait()
        assert timer.is_alive(), "no end:\n" + "".join(line for _, line in lines)
        timer.cancel()
        marks = workdir.parent.glob(f"{workdir.name}.fault*")
        struck = max((mark.stat().st_mtime for mark in marks), default=0.0)
        return Ended(status, lines, struck)

    def run(self, workdir, *changes, timeout=140, **more):
        return self.end(self.start(workdir, *changes, **more), workdir, timeout)

    def figures(self, workdir):
        """What two runs must have in common, exactly: one tuple a step."""
        lines = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
        return [tuple(line[name] for name in _FIGURES) for line in lines]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    rng = random.Random(0)
    words = "the router sends every token to two experts and adds what they say"
    lines = (" ".join(rng.choices(words.split(), k=8)) for _ in range(300))
    (folder / "text.txt").write_text("\n".join(lines))
    return Runs(folder)


@pytest.fixture(scope="session")
def quiet(runs):
    """The figures of a run of two processes that nothing disturbed."""
    ended = runs.run(runs.folder / "quiet")
    assert ended.status == 0, ended.output
    found = runs.figures(runs.folder / "quiet")
    assert [line[0] for line in found] == list(range(1, 11))
    return found
