"""Commands in processes of their own, and one finished run that all tests read."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys

import pytest

from moe_jax.observe.writers import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "end_to_end" / "tiny.py"
_SHOWS_MODULES = """
import atexit, os, sys
def show():
    with open(os.environ["MODULES_FILE"], "w") as file:
        file.write("\\n".join(sys.modules))
atexit.register(show)
"""


@dataclasses.dataclass
class Commands:
    """Starts commands of moe_jax on a text, with caches of their own."""

    folder: pathlib.Path
    root = ROOT
    tiny = TINY

    def environment(self, **extra):
        left_out = ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES")
        env = {k: v for k, v in os.environ.items() if k not in left_out}
        env |= {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # What is compiled here runs for milliseconds.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        return env | extra

    def train(self, workdir, *changes, variant=""):
        """The command line of a training run."""
        return [
            *(sys.executable, "-m", "moe_jax.cli.train"),
            f"--config={TINY}{variant and ':' + variant}",
            f"--workdir={workdir}",
            f"--config.data.source.path={self.folder / 'text.txt'}",
            f"--config.data.folder={self.folder / 'cache'}",
            "--config.data.workers=1",
            *changes,
        ]

    def command(self, name, *arguments):
        return [sys.executable, "-m", f"moe_jax.cli.{name}", *map(str, arguments)]

    def start(self, argv, **extra):
        return subprocess.Popen(
            argv,
            env=self.environment(**extra),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, argv, **extra):
        """Runs to the end, which must be good."""
        child = self.start(argv, **extra)
        try:
            out, err = child.communicate(timeout=250)
        finally:
            child.kill()
        assert child.returncode == 0, out + err
        assert "Traceback" not in err
        return out, err


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    rng = random.Random(0)
    words = "the router sends every token to two experts and adds what they say"
    lines = (" ".join(rng.choices(words.split(), k=8)) for _ in range(600))
    (folder / "text.txt").write_text("\n".join(lines))
    return Commands(folder)


@dataclasses.dataclass
class Finished:
    workdir: pathlib.Path
    out: str
    err: str
    modules: list[str]

    @property
    def metrics(self):
        return read_metrics(self.workdir / "metrics.jsonl")


@pytest.fixture(scope="session")
def finished(commands):
    """A run of sixty steps that nothing disturbed."""
    hook = commands.folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_SHOWS_MODULES)
    modules = commands.folder / "modules.txt"
    workdir = commands.folder / "finished"
    out, err = commands.run(
        commands.train(workdir),
        PYTHONPATH=f"{hook}{os.pathsep}{ROOT}",
        MODULES_FILE=str(modules),
    )
    return Finished(workdir, out, err, modules.read_text().split())


@pytest.fixture(scope="session")
def figures():
    """What two runs must have in common, exactly: one tuple a step."""

    def read(workdir):
        names = ("step", "loss", "total_loss", "grad_norm", "learning_rate", "drops")
        lines = read_metrics(workdir / "metrics.jsonl")
        return [tuple(line[name] for name in names) for line in lines]

    return read
