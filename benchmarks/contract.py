"""Holds the compiled step of three small configs to recorded costs.

  python benchmarks/contract.py                 # 1 where a cost changed
  python benchmarks/contract.py --update --why="Gather weights once per step"

Needs libtpu (`pip install 'moe_jax[plan]'`), no TPU. A change that costs must be
recorded with its reason, in the commit that makes it. `--dump=FOLDER` keeps the
compiler's files of each config there.
"""

import argparse
import json
import pathlib
import sys

from moe_jax.cli import config_file
from moe_jax.plan import contract, report, topology

FOLDER = pathlib.Path(__file__).parent / "contract"
CONFIGS = FOLDER.parents[1] / "configs" / "bench" / "contract.py"
NAMES = ("sharded", "tensor", "accumulated")
TOPOLOGY = "v5e:2x4"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"of {NAMES}")
    parser.add_argument("--update", action="store_true", help="record what is found")
    parser.add_argument("--why", default="", help="the reason, with --update")
    parser.add_argument("--dump", default="", help="folder for the compiler's files")
    options = parser.parse_args()
    names = options.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such config: {sorted(unknown)}; there are {NAMES}")
    if options.update != bool(options.why):
        parser.error('--update needs --why="the reason", and --why needs --update')
    devices = topology.find(TOPOLOGY)
    broken = 0
    for name in names:
        dump = f"{options.dump}/{name}" if options.dump else None
        config = config_file.load(f"{CONFIGS}:{name}")
        plan = report.make_plan(config, devices, dump_folder=dump)
        broken += _record(name, plan, options) if options.update else _hold(name, plan)
    return 1 if broken else 0


def _hold(name: str, plan: report.Plan) -> bool:
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    lines = contract.differences(recorded, contract.costs(plan))
    print(f"{name}: {'BROKEN' if lines else 'holds'}", flush=True)
    for line in lines:
        print(f"  {line}")
    if lines:
        print(f'  last recorded: {recorded["why"]}\n  if meant: --update --why="..."')
    return bool(lines)


def _record(name: str, plan: report.Plan, options: argparse.Namespace) -> bool:
    found = {"why": options.why, **contract.costs(plan)}
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{name}: recorded")
    return False


if __name__ == "__main__":
    sys.exit(main())
