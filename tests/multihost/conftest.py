"""One program on 1, 2 or 4 processes of this machine, by launch/local.py."""

import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
# What JAX itself says in every process; its threads mix the words of their lines.
_GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|Expected number of connected peer ranks is :"
    r"|peer ranks\."
)


def _own_lines(text):
    lines = _GLOO.sub("", text).splitlines()
    return [line for line in lines if line.strip(" 0123456789")]


@dataclasses.dataclass
class Hosts:
    """Starts commands in a folder with a text, some chats, and caches of its own."""

    folder: pathlib.Path

    def environment(self, float64):
        left_out = ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES")
        env = {k: v for k, v in os.environ.items() if k not in left_out}
        env |= {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        return env | ({"JAX_ENABLE_X64": "1"} if float64 else {})

    def start(self, count, command, *arguments, float64=False, timeout=400):
        """Status, lines of process 0, and what else was said, of `count` processes."""
        launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", str(count)]
        begin = time.monotonic()
        done = subprocess.run(
            [*launcher, f"--timeout={timeout}", "--", sys.executable, *command]
            + [str(a) for a in arguments],
            env=self.environment(float64),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout + 60,
        )
        print(f"{count} x {command[-1]}: {time.monotonic() - begin:.1f} s")
        by_process = {}
        for line in done.stdout.splitlines():
            index, _, text = line.partition("] ")
            by_process.setdefault(index, []).append(text)
        said = {i: _own_lines("\n".join(t)) for i, t in by_process.items()}
        own = said.pop("[0", [])
        others = [line for lines in said.values() for line in lines]
        return done.returncode, own, "\n".join(others) + done.stderr

    def run(self, count, command, *arguments, **options):
        """Lines of process 0, of a good end; the others say nothing."""
        status, own, rest = self.start(count, command, *arguments, **options)
        assert status == 0, "\n".join(own) + rest
        assert not rest.strip(), rest
        return own

    def train(self, count, workdir, *changes, config="plain", float64=False):
        types = ("dtype", "param_dtype") if float64 else ()
        return self.run(
            count,
            ["-m", "moe_jax.cli.train"],
            f"--config={HERE / 'spread.py'}:{config}",
            f"--workdir={workdir}",
            *(f"--config.model.{name}=float64" for name in types),
            *changes,
            float64=float64,
        )

    def command(self, count, name, *arguments, **options):
        module = f"moe_jax.cli.{name.replace(' ', '.').replace('-', '_')}"
        return self.run(count, ["-m", module], *arguments, **options)

    def hashes(self, count, workdir, expert, float64=False):
        """Of every array of every checkpoint, as so many processes restore it."""
        script = [str(HERE / "restored.py")]
        return json.loads(self.run(count, script, workdir, expert, float64=float64)[-1])


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multihost")
    rng = random.Random(0)
    words = "the router sends every token to two experts and adds what they say"
    (folder / "text").mkdir()
    for number in range(20):
        text = " ".join(rng.choices(words.split(), k=rng.randrange(3, 20)))
        (folder / "text" / f"{number:02}.txt").write_text(text)
    pairs = [
        {"prompt": rng.choice(words.split()), "answer": "x" * rng.randrange(1, 9)}
        for _ in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return Hosts(folder)
