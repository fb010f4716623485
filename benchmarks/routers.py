"""Routers on real text: held-out loss, balance and time at equal tokens.

  python benchmarks/routers.py                     # all of configs/bench/routers.py
  python benchmarks/routers.py top_k loss_free --seeds 0 1 --steps 100

Trains every router with every seed, the routers in turn within a seed, so that a
machine that slows down slows all. A run that is finished already is not repeated, and
one that was cut short goes on. Differences from the first router are taken seed by
seed: the same seed means the same examples in the same order.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

from scipy import stats

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "bench" / "routers.py"
NAMES = ("top_k", "sigmoid", "loss_free", "noisy_top_k", "top_p", "sparse_mixer")
# Steps left out of the times: compilation, and caches that fill.
WARM_UP = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"of {NAMES}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0: as configured")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "routers"))
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such router: {sorted(unknown)}; there are {NAMES}")
    found = train_all(CONFIG, names, options.seeds, options.folder, options.steps)
    if found is None:
        return 1
    print("\n".join(table({n: list(map(figures, f)) for n, f in found.items()})))
    return 0


def train_all(
    config: pathlib.Path,
    names: list[str],
    seeds: list[int],
    folder: str,
    steps: int,
    more: Sequence[str] = (),
) -> dict[str, list[pathlib.Path]] | None:
    """The folders of finished runs by name, one a seed; None where one failed.

    Args:
      config: the file of the variants.
      names: variants, trained in turn within a seed.
      seeds: of the runs.
      folder: for all of them.
      steps: of a run; 0: as configured.
      more: further flags.
    """
    found: dict[str, list[pathlib.Path]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            # A run of another length is another run.
            length = f"_{steps}_steps" if steps else ""
            run = pathlib.Path(folder) / f"{name}_{seed}{length}"
            print(f"{name}, seed {seed}: {run}", file=sys.stderr, flush=True)
            if status := train(f"{config}:{name}", seed, run, steps, more):
                print(f"it failed with status {status}; nothing is compared")
                return None
            found[name].append(run)
    return found


def train(
    config: str, seed: int, folder: pathlib.Path, steps: int, more: Sequence[str]
) -> int:
    """Runs `moe-jax train`, unless the folder holds a finished run; its status."""
    if (folder / "summary.json").exists():
        return 0
    command = [sys.executable, "-m", "moe_jax.cli.train", f"--config={config}"]
    command += [f"--workdir={folder}", f"--config.seed={seed}", *more]
    if steps:
        command.append(f"--config.train.steps={steps}")
        command.append(f"--config.schedule.warmup_steps={steps // 10}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.txt", "a") as console:
        return subprocess.run(command, stdout=console, cwd=ROOT).returncode


def figures(folder: pathlib.Path) -> dict[str, float]:
    """What one run says: losses in nats per token, times in milliseconds."""
    summary = json.loads((folder / "summary.json").read_text())
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    late = lines[min(WARM_UP, len(lines) - 1) :]
    last = lines[-max(1, len(lines) // 10) :]
    return {
        "loss": summary["held_out"]["loss"],
        "violation": summary["routing"]["max_violation_run"],
        "late_violation": statistics.mean(x["max_violation"] for x in last),
        "experts": statistics.mean(x["experts_per_token"] for x in last),
        "drops": summary["drops"],
        "step_ms": statistics.median(x["step_ms"] for x in late),
        "steps": len(lines),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.inf
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def verdict(values: list[float], reference: list[float]) -> str:
    """The paired difference, and whether it is more than chance explains."""
    pairs = zip(values, reference, strict=True)
    mean, half = interval([a - b for a, b in pairs])
    word = "within noise" if abs(mean) <= half else "worse" if mean > 0 else "better"
    return f"{mean:+.4f} ± {half:.4f} {word}"


def table(found: dict[str, list[dict]]) -> list[str]:
    """Lines of Markdown, one a router; differences are from the first."""
    names = list(found)
    first = [run["loss"] for run in found[names[0]]]
    lines = [
        "| router | held-out loss, nats (95 %) | difference from "
        f"{names[0]} (paired) | MaxVio, last tenth of steps | MaxVio over the run | "
        "experts per token | drops | ms per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        of = lambda key, name=name: [run[key] for run in found[name]]
        mean, half = interval(of("loss"))
        cells = [
            name,
            f"{mean:.4f} ± {half:.4f}",
            "" if name == names[0] else verdict(of("loss"), first),
            f"{statistics.mean(of('late_violation')):.2f}",
            f"{statistics.mean(of('violation')):.2f}",
            f"{statistics.mean(of('experts')):.2f}",
            f"{sum(of('drops'))}",
            f"{statistics.median(of('step_ms')):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    runs = found[names[0]]
    lines.append(f"\n{len(runs)} seeds, {runs[0]['steps']} steps; median ms per step.")
    if len(runs) < 3:
        lines.append("Fewer than three seeds: the intervals say little or nothing.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
