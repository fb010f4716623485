"""Compares the dispatches under routings from even to all tokens on one expert.

Example:
  moe-jax bench skew
  moe-jax bench skew --mesh=expert=4,data=2 --dispatch=exact,gather --pattern=zipf

The experts of one MoE layer, forward and backward, with a routing from outside:
balanced, uniform, zipf, steep_zipf, hot_expert, bursty, uneven_halves, hot_shard,
two_experts, one_expert, one_source, holes, empty. Prints for every dispatch its time,
rounds, memory and drops, and how far output and gradients are from those of the dense
dispatch on one device (over the choices that were served, where some were dropped).
Runs on the accelerators that are there, or on fake CPU devices. Exits with 1 where a
dispatch differs, miscounts, or drops though it is not in `MAY_DROP`.
"""

from absl import flags

from moe_jax.cli import common
from moe_jax.cli.bench import layers

FLAGS = flags.FLAGS


def define_flags() -> None:
    layers.define_flags(tokens=1024, d_model=64, d_ff=128, num_experts=16, top_k=2)
    flags.DEFINE_list("pattern", None, "Names, with commas; default: all.")
    flags.DEFINE_integer(
        "devices",
        0,
        f"Fake CPU devices; default: {layers.FAKE_DEVICES} on a CPU.",
        0,
    )
    common.define_json()


def main() -> int:
    common.check_json()
    meshes = [common.parse_mesh(text) for text in FLAGS.mesh or ()]
    dispatches, left_out = layers.dispatches()
    names = _patterns()
    from moe_jax.bench import skew, table

    layer = layers.layer()
    devices = layers.devices(meshes)
    meshes = meshes or [layers.default_mesh(len(devices))]
    layers.check(layer, meshes)
    found, figures = [], []
    for mesh in meshes:
        bench = skew.Bench(layer, mesh, devices[: mesh.fixed_devices()], FLAGS.seed)
        _say(*table.heading(layer, bench.mesh), *left_out, "", table.programs_heading())
        programs = []
        for options in dispatches:
            programs.append(bench.compile(options))
            _say(table.program(programs[-1]))
        _say(table.MEMORY, "", *table.rows_heading(FLAGS.repeats, layer.dtype))
        rows = []
        for name in names:
            rows += (of_one := bench.measure(name, programs, FLAGS.repeats))
            _say(*table.rows(bench.load(name), of_one))
        _say("", *table.worst(rows), "")
        found += rows
        figures.append(table.figures(layer, bench.mesh, programs, rows))
    common.write_json(figures)
    _say(table.summary(found))
    return 1 if any(row.problem for row in found) else 0


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def _patterns() -> list[str]:
    from moe_jax.bench.patterns import PATTERNS

    known = {name: name for name in PATTERNS}
    return (
        list(known)
        if FLAGS.pattern is None
        else layers.chosen("pattern", "pattern", known)
    )


if __name__ == "__main__":
    common.run(main, define_flags, name="bench skew")
