"""Diffusion transformers on MNIST: held-out loss by time, and samples, at equal cost.

  python benchmarks/images.py --images=IMAGES.gz --labels=LABELS.gz
  python benchmarks/images.py dense dit_moe --seeds 0 1 --steps 100 --images=...

Trains every variant of configs/dit/mnist.py with every seed, in the way of routers.py:
a finished run is not repeated, and differences from the first variant are taken seed by
seed.
"""

import argparse
import json
import pathlib
import statistics
import sys

import routers

CONFIG = routers.ROOT / "configs" / "dit" / "mnist.py"
NAMES = ("dense", "dit_moe", "promoe", "expert_choice", "dtr")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"of {NAMES}; default: all")
    parser.add_argument("--images", required=True, help="an IDX file of images")
    parser.add_argument("--labels", required=True, help="an IDX file of labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0: as configured")
    parser.add_argument("--folder", default=str(routers.ROOT / "runs" / "images"))
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such variant: {sorted(unknown)}; there are {NAMES}")
    more = [
        f"--config.data.source.images={pathlib.Path(options.images).resolve()}",
        f"--config.data.source.labels={pathlib.Path(options.labels).resolve()}",
    ]
    found = routers.train_all(
        CONFIG, names, options.seeds, options.folder, options.steps, more
    )
    if found is None:
        return 1
    print("\n".join(table({n: list(map(figures, f)) for n, f in found.items()})))
    return 0


def figures(folder: pathlib.Path) -> dict:
    """What one run says: losses as squared errors, FD, times in milliseconds."""
    summary = json.loads((folder / "summary.json").read_text())
    text = (folder / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step_ms"] for line in text.splitlines()]
    held_out, samples = summary["held_out"], summary["samples"]
    return {
        "loss": held_out["loss"],
        "by_time": held_out["by_time"],
        "fd": samples["fd"],
        "floor": samples["fd_floor"],
        "accuracy": samples["accuracy"],
        "step_ms": statistics.median(steps[min(routers.WARM_UP, len(steps) - 1) :]),
        "steps": len(steps),
    }


def table(found: dict[str, list[dict]]) -> list[str]:
    """Lines of Markdown, one a variant, then one a variant by noise time."""
    names = list(found)
    lines = [
        f"| variant | held-out loss (95 %) | difference from {names[0]} (paired) | FD "
        f"(95 %) | difference from {names[0]} (paired) | classified as asked | ms per "
        "step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        of = lambda key, name=name: [run[key] for run in found[name]]
        cells = [name]
        for key in ("loss", "fd"):
            first = [run[key] for run in found[names[0]]]
            mean, half = routers.interval(of(key))
            cells.append(f"{mean:.4f} ± {half:.4f}")
            cells.append("" if name == names[0] else routers.verdict(of(key), first))
        cells.append(f"{statistics.mean(of('accuracy')):.1%}")
        cells.append(f"{statistics.median(of('step_ms')):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    runs = found[names[0]]
    floor = statistics.mean(run["floor"] for run in runs)
    lines.append(
        f"\n{len(runs)} seeds, {runs[0]['steps']} steps. FD of real images: "
        f"{floor:.3f}."
    )
    if len(runs) < 3:
        lines.append("Fewer than three seeds: the intervals say little or nothing.")
    bins = len(runs[0]["by_time"])
    ends = [f"{i / bins:.1f} to {(i + 1) / bins:.1f}" for i in range(bins)]
    lines += ["", f"| variant, by noise time | {' | '.join(ends)} |"]
    lines.append(f"|---|{'---|' * bins}")
    for name in names:
        columns = zip(*(run["by_time"] for run in found[name]), strict=True)
        cells = map(routers.interval, columns)
        cells = (f"{mean:.4f} ± {half:.4f}" for mean, half in cells)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
