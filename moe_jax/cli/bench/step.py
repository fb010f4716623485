"""Trains some steps of a config and says where their time goes.

Example:
  moe-jax bench step
  moe-jax bench step --config=configs/quickstart.py --config.mesh.expert=1 --steps=20

The very step and input of `train`, on the devices that are there (of a CPU as many as
the mesh asks for). Prints the time to compile, the time of a step, tokens per second,
MFU where the device's peak is known, memory; what a step waits for its input, and
before how many steps the device had run out of work; and the host's time to start a
step beside that of a bare `jax.jit` with as many arrays. Nothing is saved.
"""

import dataclasses

from absl import flags

from moe_jax.cli import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config(default="configs/quickstart.py")
    common.define_hosts()
    flags.DEFINE_integer("steps", 20, "Timed steps.", 1)
    flags.DEFINE_integer("warm_up", 3, "Steps before them.", 1)
    flags.DEFINE_integer("calls", 15, "Calls on an idle device, of each kind.", 1)
    common.define_json()


def main() -> int:
    config = common.load_config()
    common.check_json()
    common.start_hosts(config)
    from moe_jax.bench import step, timing
    from moe_jax.parallel import distributed

    if distributed.is_primary():
        print(timing.describe_machine(), flush=True)
    bench = step.Bench(config)
    report = bench.measure(FLAGS.steps, FLAGS.warm_up, FLAGS.calls)
    if distributed.is_primary():
        print("\n".join(_lines(report, bench.parts)), flush=True)
        figures = {
            name: value.figures() if isinstance(value, timing.Times) else value
            for name, value in (
                (f.name, getattr(report, f.name)) for f in dataclasses.fields(report)
            )
        }
        mesh = dict(bench.parts.mesh.shape)
        common.write_json({"machine": timing.machine(), "mesh": mesh, **figures})
    return 0


def _lines(report, parts):
    mesh, ms = parts.mesh, 1e3
    sizes = " ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    kind = mesh.devices.flat[0].device_kind
    total, active = parts.model.count_parameters()
    yield (
        f"{mesh.size} x {kind!r}, mesh {sizes or 'of one'}; {total:,} parameters, "
        f"{active:,} active; {report.tokens:,} tokens a step"
    )
    yield f"ms: median of {len(report.step.seconds)} steps, and the quartiles"
    phases = ", ".join(f"{name} {s:.1f}" for name, s in report.compile_seconds.items())
    yield _row("compile, s", f"{sum(report.compile_seconds.values()):.1f} ({phases})")
    yield _row("step, ms", report.step.shown(ms))
    yield _row("tokens/s", f"{report.tokens / report.step.median:,.0f}")
    mfu = f"{report.mfu:.1%}" if report.mfu else f"unknown: no peak listed for {kind!r}"
    yield _row("MFU", mfu)
    yield _row("loss, first and last", "{:.4f} {:.4f}".format(*report.losses))
    yield _row(
        "memory in use at most", _gb(report.peak_bytes, "not told by this backend")
    )
    yield _row("memory by the compiler", _gb(report.program_bytes, "unknown"))
    yield _row("waiting for rows, ms", report.waiting.shown(ms))
    yield _row("placing them, ms", report.placing.shown(ms))
    yield _row("share of time waiting", f"{report.waiting_share:.3%}")
    yield _row(
        "device out of work",
        f"before {report.idle_steps} of {len(report.step.seconds)}",
    )
    into, out = report.leaves
    yield (
        f"host: {len(report.dispatch.seconds)} calls of each in turn on an idle "
        f"device, {into} arrays in and {out} out"
    )
    yield _row("start a step, ms of CPU", report.dispatch.shown(ms))
    yield _row("start a bare jit", report.bare.shown(ms))
    yield _row("the same, in trees", report.bare_trees.shown(ms))
    yield _row("step over bare jit", f"{report.host_ratio:.2f}")
    yield _row("call returns after, ms", report.returns.shown(ms))


def _row(name: str, value: str) -> str:
    return f"  {name:<26}{value}"


def _gb(nbytes: int | None, otherwise: str) -> str:
    return otherwise if nbytes is None else f"{nbytes / 1e9:.3f} GB a device"


if __name__ == "__main__":
    common.run(main, define_flags, name="bench step")
