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

import dataclasses
import math

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError, nearest

FLAGS = flags.FLAGS
_FAKE_DEVICES = 8


def define_flags() -> None:
    integer = flags.DEFINE_integer
    flags.DEFINE_list("dispatch", None, "Names, with commas; default: all but dense.")
    flags.DEFINE_list("pattern", None, "Names, with commas; default: all.")
    flags.DEFINE_multi_string(
        "mesh", None, "As expert=4,data=2; may be repeated. Default: all on expert."
    )
    integer("devices", 0, f"Fake CPU devices; default: {_FAKE_DEVICES} on a CPU.", 0)
    integer("tokens", 1024, "Tokens, over all devices.", 1)
    integer("d_model", 64, "Width of the model.", 1)
    integer("d_ff", 128, "Width of an expert.", 1)
    integer("num_experts", 16, "Experts.", 1)
    integer("top_k", 2, "Experts of a token.", 1)
    flags.DEFINE_enum(
        "dtype", "float32", ["bfloat16", "float32", "float64"], "Of the computation."
    )
    flags.DEFINE_float(
        "capacity_factor", None, "Of the dispatches; default: that of each.", 0.0
    )
    integer("repeats", 10, "Timed runs of each.", 1)
    integer("seed", 0, "Of inputs and drawn routings.", 0)
    common.define_json()


def main() -> int:
    common.check_json()
    meshes = [common.parse_mesh(text) for text in FLAGS.mesh or ()]
    dispatches, left_out = _dispatches()
    names = _patterns()
    from moe_jax.bench import layer as layer_lib
    from moe_jax.bench import skew, table

    fields = dataclasses.fields(layer_lib.Layer)
    layer = layer_lib.Layer(**{f.name: FLAGS[f.name].value for f in fields})
    devices = _devices(meshes)
    meshes = meshes or [_default_mesh(len(devices))]
    for mesh in meshes:
        if problem := next(layer_lib.problems(layer, mesh), None):
            raise UserError(problem)
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


def _chosen(flag: str, kind: str, choices: dict) -> list:
    """What a list of names stands for, each once, in its order.

    Raises:
      UserError: an unknown name, or none at all.
    """
    names = [name.strip().lower() for name in FLAGS[flag].value]
    for name in names or [""]:
        if name not in choices:
            raise UserError(
                f"--{flag}: {name!r} is not a {kind}{nearest(name, choices)} "
                f"({kind}s: {', '.join(choices)})"
            )
    return [choices[name] for name in dict.fromkeys(names)]


def _patterns() -> list[str]:
    from moe_jax.bench.patterns import PATTERNS

    known = {name: name for name in PATTERNS}
    return (
        list(known) if FLAGS.pattern is None else _chosen("pattern", "pattern", known)
    )


def _dispatches() -> tuple[list, list[str]]:
    """The dispatches to compare, with their options, and lines on what is left out."""
    from moe_jax.moe.dispatch import DISPATCHES
    from moe_jax.moe.dispatch.dense import DenseDispatch

    names = {
        kind.__name__.lower().removesuffix("dispatch"): kind for kind in DISPATCHES
    }
    if FLAGS.dispatch is None:
        kinds = [kind for kind in DISPATCHES if kind is not DenseDispatch]
    else:
        kinds = _chosen("dispatch", "dispatch", names)
    factor, lines = FLAGS.capacity_factor, []
    if factor is None:
        return [kind() for kind in kinds], lines
    if not math.isfinite(factor):
        raise UserError(f"--capacity_factor={factor}: must be a number, 0 or more")
    without = [k for k in kinds if not hasattr(k, "capacity_factor")]
    if without:
        shown = ", ".join(kind.__name__ for kind in without)
        if FLAGS.dispatch is not None:
            raise UserError(
                f"--capacity_factor={factor}: {shown} has none; leave out one of them"
            )
        lines = [f"left out: {shown}: no capacity_factor to set"]
    kinds = [kind for kind in kinds if kind not in without]
    return [kind(capacity_factor=factor) for kind in kinds], lines


def _devices(meshes: list) -> list:
    """The accelerators that are there, or as many fake CPU devices as are needed.

    Raises:
      UserError: a mesh needs more than there are, or --devices says otherwise.
    """
    needed = max((mesh.fixed_devices() for mesh in meshes), default=0)
    if needed and FLAGS.devices not in (0, needed):
        raise UserError(
            f"--devices={FLAGS.devices}, but --mesh needs {needed}: leave out one of "
            "them"
        )
    import jax

    if FLAGS.devices:
        jax.config.update("jax_platforms", "cpu")
    count = FLAGS.devices or needed or _FAKE_DEVICES
    if jax.config.jax_num_cpu_devices < count:
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < needed:
        raise UserError(
            f"--mesh needs {needed} devices, but there are {len(devices)} of kind "
            f"{devices[0].device_kind!r}; --devices={needed} takes fake CPU devices"
        )
    return devices[:count] if devices[0].platform == "cpu" else devices


def _default_mesh(num_devices: int):
    """As many devices as divide the experts on the axis expert, the rest on data."""
    from moe_jax.config import MeshConfig

    expert = math.gcd(num_devices, FLAGS.num_experts)
    return MeshConfig(expert=expert, data=num_devices // expert)


if __name__ == "__main__":
    common.run(main, define_flags, name="bench skew")
