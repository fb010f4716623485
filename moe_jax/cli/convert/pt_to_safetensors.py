"""Writes the tensors of a torch checkpoint as a safetensors file.

Example:
  moe-jax convert pt-to-safetensors --file=last.pt --key=ema --out=model.safetensors

Needs torch. Nothing but tensors and plain values is unpickled.
"""

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("file", "", "Checkpoint, as torch.save wrote it.")
    flags.DEFINE_string("out", "", "File to write; it must not be there yet.")
    flags.DEFINE_string("key", "", "Of the dict of tensors inside, as ema or model.")
    flags.DEFINE_string("prefix", "", "Taken off all names, as 'module.'.")


def main() -> int:
    from moe_jax.convert import pt_file, target

    if not FLAGS.file:
        raise UserError("--file is missing: a checkpoint of torch")
    target.check_free_file(FLAGS.out, "out")
    pt_file.convert(FLAGS.file, FLAGS.out, key=FLAGS.key, prefix=FLAGS.prefix)
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
