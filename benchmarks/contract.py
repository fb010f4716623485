"""Holds the compiled step of three small configs to recorded costs.

  python benchmarks/contract.py                 # 1 where a cost changed
  python benchmarks/contract.py --update --why="Gather weights once per step"

Needs libtpu (`pip install 'moe_jax[plan]'`), no TPU. A change that costs must be
recorded with its reason, in the commit that makes it.
"""

import argparse
import json
import pathlib
import sys

from moe_jax.cli import config_file
from moe_jax.plan import contract, worker

FOLDER = pathlib.Path(__file__).parent / "contract"
CONFIGS = FOLDER.parents[1] / "configs" / "bench" / "contract.py"
NAMES = ("sharded", "tensor", "accumulated")
TOPOLOGY = "v5e:2x4"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"of {NAMES}")
    parser.add_argument("--update", action="store_true", help="record what is found")
    parser.add_argument("--why", default="", help="the reason, with --update")
    options = parser.parse_args()
    names = options.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such config: {sorted(unknown)}; there are {NAMES}")
    if options.update != bool(options.why):
        parser.error('--update needs --why="the reason", and --why needs --update')
    broken = False
    for name in names:
        found = _costs(name)
        if options.why:
            _record(name, found, options.why)
        else:
            broken |= _hold(name, found)
    return 1 if broken else 0


def _costs(name: str) -> dict:
    config = config_file.load(f"{CONFIGS}:{name}")
    plan = worker.compile_apart(worker.Request.of(config, TOPOLOGY, quick=True))
    if "error" in plan:
        sys.exit(f"{name}: {plan['error']}")
    return contract.costs(plan)


def _hold(name: str, found: dict) -> bool:
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    lines = contract.differences(recorded, found)
    print(f"{name}: {'BROKEN' if lines else 'holds'}", flush=True)
    for line in lines:
        print(f"  {line}")
    if lines:
        print(f'  last recorded: {recorded["why"]}\n  if meant: --update --why="..."')
    return bool(lines)


def _record(name: str, found: dict, why: str) -> None:
    text = json.dumps({"why": why, **found}, indent=2)
    (FOLDER / f"{name}.json").write_text(text + "\n")
    print(f"{name}: recorded")


if __name__ == "__main__":
    sys.exit(main())
