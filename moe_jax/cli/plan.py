"""Says what a train step needs and costs on devices that are not there.

Example:
  moe-jax plan --config=configs/bench/small.py --topology=v5e:4x4
  moe-jax plan --config=configs/bench/small.py --topology=v5e:4x4 --search

Compiles the very step that `train` runs with the real compiler for TPUs (install it
with `pip install 'moe_jax[plan]'`; no TPU is needed) and reads the program: memory by
class and whether it fits, FLOPs, HBM traffic, collectives and what hides them. Times
are modelled. Nothing is allocated, no data is read. --quick stops before machine code
is made, which takes most of the time; only the cycle estimates are then missing. With
--topology=cpu:8 the host's compiler stands in: memory only. With --search it tries
meshes, dispatches, remat policies and micro-batches, and prints the best with the
lines to paste. Exits with 1 where the step does not fit.
"""

import dataclasses

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config()
    flags.DEFINE_string("topology", "", "KIND:SHAPE, as v5p:4x4x4; cpu:8: the host.")
    flags.DEFINE_integer("slices", 1, "Slices of that topology.", 1)
    flags.DEFINE_string("dump-hlo", "", "New folder for the compiler's files.")
    common.define_json()
    flags.DEFINE_bool("quick", False, "Leave out machine code: seconds, not minutes.")
    flags.DEFINE_float(
        "loop_passes", 0.0, "Passes assumed of loops that depend on data.", 0.0
    )
    flags.DEFINE_bool("search", False, "Look for the best mesh and settings.")
    flags.DEFINE_integer("compile_best", 16, "With --search: points to compile.", 1)
    flags.DEFINE_integer("workers", 2, "With --search: compilations at once.", 1)


def main() -> int:
    config = common.load_config()
    if not FLAGS.topology:
        from moe_jax.plan import topology

        raise UserError(f"--topology is missing: {topology.describe_names()}")
    common.check_json()
    if FLAGS.search:
        return _search(config)
    for name in ("compile_best", "workers"):
        if FLAGS[name].present:
            raise UserError(f"--{name} belongs to --search")
    if FLAGS.topology.startswith("cpu:") and (FLAGS.quick or FLAGS.loop_passes):
        raise UserError(
            "--quick and --loop_passes are for TPUs; of the host's compiler only the "
            "memory is read"
        )
    from moe_jax.plan import program, report, text, topology

    plan = report.make_plan(
        config,
        topology.find(FLAGS.topology, FLAGS.slices),
        loop_passes=FLAGS.loop_passes,
        dump_folder=FLAGS["dump-hlo"].value or None,
        quick=FLAGS.quick,
    )
    print("\n".join(text.lines(plan)), flush=True)
    common.write_json(plan.to_json())
    status = 1 if plan.fits is False else 0
    return program.leave(status) if FLAGS.quick else status


def _search(config) -> int:
    from moe_jax.plan import search, topology

    if FLAGS["dump-hlo"].value or FLAGS.loop_passes:
        raise UserError("--search takes neither --dump-hlo nor --loop_passes")
    if FLAGS["quick"].present:
        raise UserError("--search is quick always: leave out --quick")
    found = search.search(
        config,
        topology.find(FLAGS.topology, FLAGS.slices),
        compile_best=FLAGS.compile_best,
        workers=FLAGS.workers,
        on_plan=lambda point: print(f"compiled {point.candidate.settings}", flush=True),
    )
    print("\n".join(search.lines(found)), flush=True)
    common.write_json([_row(point) for point in found.points])
    return 0 if found.winner else 1


def _row(point):
    return {
        "layout": str(point.candidate.settings),
        "flags": list(point.candidate.flags),
        "python": list(point.candidate.python),
        "estimate": dataclasses.asdict(point.estimate),
        "plan": point.plan,
    }


if __name__ == "__main__":
    common.run(main, define_flags)
