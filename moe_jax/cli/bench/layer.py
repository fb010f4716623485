"""Times the experts of one MoE layer, forward and backward, under each dispatch.

Example:
  moe-jax bench layer
  moe-jax bench layer --num_experts=64 --top_k=8 --d_model=2048 --d_ff=1024 \
      --tokens=16384 --dtype=bfloat16

A routing drawn with even chances comes from outside. Prints the time, the FLOP/s of
the useful work (padding, and what is computed again, count for nothing), and their
share of the rate of a dense matmul of the same rows, timed in turn with the layer. Runs
on the accelerators that are there, or on one CPU device; the second example is the
case for a GPU. `bench skew` compares the numbers.
"""

import dataclasses

from absl import flags

from moe_jax.cli import common
from moe_jax.cli.bench import layers

FLAGS = flags.FLAGS


def define_flags() -> None:
    layers.define_flags(tokens=1024, d_model=512, d_ff=512, num_experts=16, top_k=2)
    flags.DEFINE_integer("devices", 0, "Fake CPU devices; default: 1 on a CPU.", 0)
    common.define_json()


def main() -> int:
    common.check_json()
    meshes = [common.parse_mesh(text) for text in FLAGS.mesh or ()]
    dispatches, left_out = layers.dispatches()
    from moe_jax.bench import dense, skew, table, timing

    layer = layers.layer()
    devices = layers.devices(meshes, fake=1)
    meshes = meshes or [layers.default_mesh(len(devices))]
    layers.check(layer, meshes)
    print(timing.describe_machine(), flush=True)
    figures = []
    for mesh in meshes:
        bench = skew.Bench(layer, mesh, devices[: mesh.fixed_devices()], FLAGS.seed)
        lines = [
            *table.heading(layer, bench.mesh),
            *left_out,
            "",
            table.speed_heading(),
        ]
        print("\n".join(lines), flush=True)
        programs = [bench.compile(options) for options in dispatches]
        call, flops = dense.matmul(layer)
        *times, of_dense = bench.times("uniform", programs, FLAGS.repeats, beside=call)
        # One device multiplies; the layer has all of them.
        rate = flops / of_dense.median * bench.mesh.size
        work = dense.layer_flops(layer)
        for program, taken in zip(programs, times, strict=True):
            print(table.speed(program, taken, work, rate))
        print(table.dense_speed(of_dense, flops, bench.mesh.size), flush=True)
        found = zip(programs, times, strict=True)
        figures.append(
            {
                "machine": timing.machine(),
                "mesh": dict(bench.mesh.shape),
                "layer": dataclasses.asdict(layer),
                "useful_flops": work,
                "dense_flops_per_second": rate,
                "dense": of_dense.figures(),
                "dispatches": {p.name: taken.figures() for p, taken in found},
            }
        )
    common.write_json(figures)
    return 0


if __name__ == "__main__":
    common.run(main, define_flags, name="bench layer")
