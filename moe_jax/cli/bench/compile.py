"""Says how long a config's train step takes to trace, to lower and to compile.

Example:
  moe-jax bench compile
  moe-jax bench compile --config=configs/bench/small.py --topology=v5e:4x4 --repeats=1

For the devices that are there (of a CPU as many as the mesh asks for), or for a
topology that is not, as `moe-jax plan` does. Each repeat begins from nothing, without
a compilation cache. Also prints the most memory that the process has had.
"""

from absl import flags

from moe_jax.cli import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config(default="configs/quickstart.py")
    flags.DEFINE_string("topology", "", "As v5e:4x4; default: the devices here.")
    flags.DEFINE_integer("slices", 1, "Slices of that topology.", 1)
    flags.DEFINE_integer("repeats", 3, "Compilations.", 1)
    common.define_json()


def main() -> int:
    config = common.load_config()
    common.check_json()
    devices, where = _devices(config)
    from moe_jax.bench import compiling, timing
    from moe_jax.train import setup

    print(timing.describe_machine(), flush=True)
    parts = setup.make_parts(config, devices)
    before = compiling.peak_host_bytes()
    found = [compiling.compile_step(parts).seconds for _ in range(FLAGS.repeats)]
    after = compiling.peak_host_bytes()
    times = compiling.times(found)
    print(f"for {where}; s: median of {FLAGS.repeats} and the quartiles")
    for name, of_it in times.items():
        print(f"  {name:<10}{of_it.shown(1)}")
    print(f"host memory at most {after / 1e9:.2f} GB, {before / 1e9:.2f} before")
    figures = {name: of_it.figures() for name, of_it in times.items()}
    memory = {"peak_host_bytes": after, "peak_host_bytes_before": before}
    common.write_json(
        {"machine": timing.machine(), "for": where, "seconds": figures, **memory}
    )
    return 0


def _devices(config):
    """The devices to compile for, and their name; None stands for those here."""
    if FLAGS.topology:
        from moe_jax.plan import topology

        found = topology.find(FLAGS.topology, FLAGS.slices)
        return list(found.devices), str(found)
    if FLAGS["slices"].present:
        from moe_jax.errors import UserError

        raise UserError("--slices belongs to --topology")
    import jax

    from moe_jax.parallel import distributed

    distributed.start(config.mesh)
    devices = jax.devices()
    return None, f"{len(devices)} x {devices[0].device_kind!r}"


if __name__ == "__main__":
    common.run(main, define_flags, name="bench compile")
