"""Trains for some minutes under launch/local.py while faults strike, and compares.

  python benchmarks/soak.py --minutes=30

Every `--every` seconds one of these happens to one of the processes, or to all:
SIGKILL, SIGTERM, SIGSTOP, some slow seconds (SIGSTOP and SIGCONT), the folder of
checkpoints gone for some seconds, the newest checkpoint damaged and SIGKILL, SIGKILL of
the launcher. When the minutes are over the run is stopped by SIGTERM, and a quiet run
of as many steps follows. The losses of all steps must be equal, to the bit. The memory
of the processes (VmRSS) is read every second; its slope is that of a straight line
through the quiet run's, from its second hundred of steps on.

Exit status: 0 where all losses are equal, else 1.
"""

import argparse
import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moe_jax.observe.writers import read_metrics  # noqa: E402

CONFIG = ROOT / "tests" / "faults" / "tiny_run.py"
_FOR_EVER = 10**8
_STEADY = 200  # Steps after which everything has been compiled and done once.


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30)
    add("--every", type=float, default=60, help="seconds between faults")
    add("-n", type=int, default=2, help="processes")
    add("--seed", type=int, default=0, help="of the faults")
    add("--folder", default="", help="for the runs; default: a new one in TMPDIR")
    return parser.parse_args()


class Run:
    """A run of several processes, started anew as often as it ends."""

    def __init__(self, folder: pathlib.Path, name: str, n: int):
        self.folder, self.workdir = folder, folder / name
        self.n, self.damaged = n, -1
        self.launcher: subprocess.Popen | None = None
        self.memory: dict[int, list[tuple[float, float]]] = collections.defaultdict(
            list
        )

    def start(self, steps: int) -> None:
        command = [sys.executable, str(ROOT / "launch" / "local.py"), f"-n={self.n}"]
        command += ["--devices-per-process=1", "--restart=1000", "--backoff=1", "--"]
        command += [sys.executable, "-m", "moe_jax.cli.train"]
        command += [f"--config={CONFIG}:{self.n}", f"--workdir={self.workdir}"]
        command += [f"--config.data.source.path={self.folder / 'text.txt'}"]
        command += [f"--config.data.folder={self.folder / 'cache'}"]
        command += [f"--config.train.steps={steps}", "--config.checkpoint.every=50"]
        command += ["--config.eval.every=400", "--config.train.agree_every=100"]
        command += ["--config.train.watchdog_secs=120", "--config.log.every=200"]
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "MOE_JAX_HEARTBEAT_SECS": "30",  # A stopped process is found in time.
        }
        with open(f"{self.workdir}.log", "ab") as log:
            self.launcher = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    def processes(self) -> list[int]:
        pid = self.launcher.pid
        try:
            text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            return []
        return [int(child) for child in text.split()]

    def measure(self) -> None:
        for pid in self.processes():
            try:
                text = pathlib.Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            found = [line for line in text.splitlines() if line.startswith("VmRSS")]
            if found:
                mib = int(found[0].split()[1]) / 1024
                self.memory[pid].append((time.monotonic(), mib))

    def steps(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def losses(self) -> list[tuple[int, float]]:
        lines = read_metrics(self.workdir / "metrics.jsonl")
        return [(line["step"], line["loss"]) for line in lines]


def send(number: int):
    def fault(run: Run, rng: random.Random) -> None:
        if pids := run.processes():
            os.kill(rng.choice(pids), number)

    return fault


def slow(run: Run, rng: random.Random) -> None:
    if not (pids := run.processes()):
        return
    pid = rng.choice(pids)
    for _ in range(10):
        for number, secs in ((signal.SIGSTOP, 1.0), (signal.SIGCONT, 0.5)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            time.sleep(secs)


def away(run: Run, rng: random.Random) -> None:
    folder = run.workdir / "checkpoints"
    aside = folder.with_name("away")
    if not folder.is_dir() or aside.exists():
        return
    folder.rename(aside)
    folder.write_text("no folder")
    time.sleep(5)
    folder.unlink()
    aside.rename(folder)


def damage(run: Run, rng: random.Random) -> None:
    steps = run.steps()
    if len(steps) > 1 and steps[-1] != run.damaged:  # One whole one must be left.
        run.damaged = steps[-1]
        newest = run.workdir / "checkpoints" / str(steps[-1]) / "state"
        files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 999]
        if files:
            with open(rng.choice(files), "r+b") as file:
                file.truncate(500)
    send(signal.SIGKILL)(run, rng)


def kill_launcher(run: Run, rng: random.Random) -> None:
    run.launcher.kill()


FAULTS = {
    "kill": send(signal.SIGKILL),
    "term": send(signal.SIGTERM),
    "stop": send(signal.SIGSTOP),
    "slow": slow,
    "store away": away,
    "damage and kill": damage,
    "kill the launcher": kill_launcher,
}


def disturb(run: Run, args: argparse.Namespace, log) -> collections.Counter:
    """Keeps the run going for the minutes, with faults; returns which there were."""
    rng, counts = random.Random(args.seed), collections.Counter()
    end = time.monotonic() + 60 * args.minutes
    following = time.monotonic() + args.every
    run.start(_FOR_EVER)
    while time.monotonic() < end:
        time.sleep(1)
        run.measure()
        if run.launcher.poll() is not None:  # By SIGTERM, or killed itself.
            log(f"the launcher ended with status {run.launcher.returncode}; again")
            time.sleep(2)
            run.start(_FOR_EVER)
        if time.monotonic() > following:
            name = rng.choice(list(FAULTS))
            log(f"fault: {name}; steps saved: {run.steps()}")
            counts[name] += 1
            FAULTS[name](run, rng)
            following = time.monotonic() + args.every
    finish(run)
    return counts


def finish(run: Run) -> None:
    """Stops the run with a checkpoint."""
    while run.launcher.poll() is None:
        # Again and again: while all start, nobody listens.
        run.launcher.send_signal(signal.SIGTERM)
        try:
            run.launcher.wait(timeout=300)
        except subprocess.TimeoutExpired:
            pass


def slope(run: Run) -> float:
    """MiB an hour, of the process with the steepest; NaN where there is too little."""
    found = []
    for samples in run.memory.values():
        if len(samples) > 10:
            at, mib = np.array(samples).T
            found.append(np.polyfit(at / 3600, mib, 1)[0])
    return max(found, default=float("nan"))


def main() -> int:
    args = parse()
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="soak_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = "the router sends every token to two experts and adds what they say"
    lines = (" ".join(rng.choices(words.split(), k=8)) for _ in range(3000))
    (folder / "text.txt").write_text("\n".join(lines))
    begin = time.monotonic()
    log = lambda text: print(f"{time.monotonic() - begin:6.0f} s  {text}", flush=True)
    disturbed, quiet = (Run(folder, name, args.n) for name in ("disturbed", "quiet"))
    counts = disturb(disturbed, args, log)
    found = disturbed.losses()
    steps = found[-1][0]
    log(f"{steps} steps, {sum(counts.values())} faults: {dict(counts)}")
    quiet.start(steps)
    while quiet.launcher.poll() is None:
        time.sleep(1)
        if max(quiet.steps(), default=0) >= _STEADY:
            quiet.measure()
    expected = quiet.losses()
    log(f"quiet run: status {quiet.launcher.returncode}, {len(expected)} steps")
    unlike = [a for a, b in zip(found, expected, strict=False) if a != b]
    same = len(found) == len(expected) and not unlike
    print(f"last loss: {found[-1]} disturbed, {expected[-1]} quiet")
    print(
        f"all {len(found)} losses equal: {same}" + ("" if same else f"; {unlike[:3]}")
    )
    rss = [samples[-1][1] for samples in quiet.memory.values()]
    print(
        f"memory of a process at the end of the quiet run: {max(rss, default=0):.0f} "
        f"MiB, slope {slope(quiet):+.1f} MiB/h"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
