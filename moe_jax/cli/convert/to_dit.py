"""Writes the model of a workdir as a file with the names of DiT and DiT-MoE.

Example:
  moe-jax convert to-dit --workdir=runs/s --out=model.safetensors

The averaged parameters are written, where there are any.
"""

from absl import flags

from moe_jax.cli import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_workdir()
    flags.DEFINE_string("out", "", "File to write; it must not be there yet.")
    flags.DEFINE_enum(
        "dtype",
        "",
        ["", "float32", "bfloat16", "float16"],
        "Of the tensors; default: as the parameters are.",
    )


def main() -> int:
    from moe_jax.convert import target

    target.check_free_file(FLAGS.out, "out")
    config = common.read_workdir_config()
    from moe_jax.parallel import distributed

    distributed.start(config.mesh)
    from moe_jax.convert import to_dit

    to_dit.convert(FLAGS.workdir, FLAGS.out, config, dtype=FLAGS.dtype, step=FLAGS.step)
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
