"""Writes the model of a workdir as a folder that Hugging Face transformers loads.

Example:
  moe-jax convert to-hf --workdir=runs/tuned --out=models/tuned

Tokenizer files that came with the model go along. The averaged parameters are written,
where there are any. Without --family it is the one that the model came from, else the
first that can express it.
"""

from absl import flags

from moe_jax.cli import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_workdir()
    flags.DEFINE_string("out", "", "Folder to make; it must not be there yet.")
    flags.DEFINE_string("family", "", "Kind of model, as model_type in config.json.")
    flags.DEFINE_enum(
        "dtype",
        "",
        ["", "float32", "bfloat16"],
        "Of the tensors; default: as they were imported, else as the parameters are.",
    )
    flags.DEFINE_float("max_shard_gb", 5.0, "Size of a file, at most.", 1e-6)


def main() -> int:
    from moe_jax.convert import target

    target.check_free(FLAGS.out, "out")
    config = common.read_workdir_config()
    from moe_jax.parallel import distributed

    distributed.start(config.mesh)
    from moe_jax.convert import to_hf

    to_hf.convert(
        FLAGS.workdir,
        FLAGS.out,
        config,
        family=FLAGS.family,
        dtype=FLAGS.dtype,
        most_bytes=int(FLAGS.max_shard_gb * 1e9),
        step=FLAGS.step,
    )
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
