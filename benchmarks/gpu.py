"""What the kernels for NVIDIA GPUs give and cost, in one call; not run on a GPU yet.

  python benchmarks/gpu.py                     # on one H100 or H200
  python benchmarks/gpu.py --tiny              # on a CPU, kernels in the interpreter

Parts, each in a process of its own, so that one that fails takes no other with it:

- `kernels`: values and gradients beside numpy in double precision, and the rate of
  each kernel at the layer's size, by its tiles;
- `layer`: an MoE layer, forward and backward, under each way to lay out its rows, as a
  share of the rate of a dense product measured in the same process;
- `step`: a training step of the shape of OLMoE-1B-7B;
- `torch`: PyTorch's grouped matmul on the same shapes, where PyTorch is;
- `absent`, only if named: memory of layer and step, compiled for an H200 without one.

All figures go to `PART.json` in the folder `--out`, row by row. The status is 1 where a
part fails or a kernel is not exact.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

from gpu_parts import common

ROOT = pathlib.Path(__file__).parents[1]
# Seconds that a part may take.
PARTS = {"kernels": 150, "layer": 130, "step": 200, "torch": 60, "absent": 600}
DEFAULT = ("kernels", "layer", "step", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", help=f"of {[*PARTS]}")
    parser.add_argument("--out", default=str(ROOT / "runs" / "gpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {sorted(unknown)}; there are {[*PARTS]}")
    out = pathlib.Path(options.out).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = options.parts or DEFAULT
    if options.inside:
        sizes = common.TINY if options.tiny else common.Sizes()
        return int(not all([measure(part, out, sizes) for part in parts]))
    failed = [part for part in parts if not start(part, out, options.tiny)]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def start(part: str, out: pathlib.Path, tiny: bool) -> bool:
    """Runs one part in a process of its own; whether it ended well."""
    (out / f"{part}.json").unlink(missing_ok=True)
    # More than JAX takes by itself: the model's state alone is 83 GB.
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, part, f"--out={out}", "--inside"]
    print(f"## {part}", flush=True)
    try:
        done = subprocess.run(
            command + ["--tiny"] * tiny, env=env, timeout=PARTS[part], check=False
        )
    except subprocess.TimeoutExpired:
        print(f"it took more than {PARTS[part]} s and was ended")
        return False
    return done.returncode == 0


def measure(part: str, out: pathlib.Path, sizes: common.Sizes) -> bool:
    """Rows of a part, printed and written one by one; whether all are exact."""
    module = importlib.import_module(f"gpu_parts.{part}")
    rows: list[dict] = []
    for row in module.measure(sizes):
        rows.append(row)
        print("  ".join(f"{k}={_text(v)}" for k, v in row.items()), flush=True)
        whole = {"sizes": dataclasses.asdict(sizes), "rows": rows}
        (out / f"{part}.json").write_text(json.dumps(whole, indent=1) + "\n")
    return all(row.get("equal", True) for row in rows)


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
