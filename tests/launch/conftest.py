"""Launchers as programs of their own, and what their dry runs must print."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
_LEFT_OUT = ("MOE_JAX", "SLURM", "OMPI", "PMI", "JAX_", "XLA_", "NPROC", "MPIRUN")


class Launchers:
    """Runs files of launch/ without the variables of other schedulers."""

    root = ROOT
    local = (sys.executable, str(ROOT / "launch" / "local.py"))
    gke = (sys.executable, str(ROOT / "launch" / "gke.py"))

    def script(self, name):
        return ("bash", str(ROOT / "launch" / name))

    def environment(self, **extra):
        env = {k: v for k, v in os.environ.items() if not k.startswith(_LEFT_OUT)}
        return env | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | extra

    def start(self, *argv, **extra):
        return subprocess.Popen(
            list(map(str, argv)),
            env=self.environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv, timeout=60, **extra):
        child = self.start(*argv, **extra)
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            child.kill()
        return subprocess.CompletedProcess(argv, child.returncode, out, err)

    def golden(self, name, text):
        """What a dry run printed is what the file says."""
        assert text == (GOLDEN / f"{name}.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def launchers():
    return Launchers()
