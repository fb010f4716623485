"""Makes a workdir of a Hugging Face checkpoint, to be scored, written with or trained.

Example:
  moe-jax convert from-hf --checkpoint=models/olmoe --workdir=runs/olmoe
  moe-jax convert from-hf --checkpoint=models/olmoe --workdir=runs/new --config=tune.py
  moe-jax train --workdir=runs/new

The checkpoint is a folder with config.json and safetensors files. What the model is
comes from there; data, optimizer, schedule and mesh come from --config, and of its
model only how it runs: attention, types, remat, dispatch, balance, noise, mtp. Nothing
is written where a tensor is missing, left over, misshapen or not finite.
"""

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config()
    common.define_hosts()
    flags.DEFINE_string("checkpoint", "", "Folder of the model.")
    flags.DEFINE_string("workdir", "", "Folder to make; it must not be there yet.")
    flags.DEFINE_enum(
        "dtype", "", ["", "float32", "bfloat16"], "Of the parameters; default: float32."
    )
    flags.DEFINE_string(
        "mesh", "", "Mesh to lay it out on, as expert=4,fsdp=2; default: of the config."
    )


def main() -> int:
    from moe_jax.convert import from_hf, target
    from moe_jax.parallel import distributed

    if not FLAGS.checkpoint:
        raise UserError("--checkpoint is missing: a folder with a Hugging Face model")
    target.check_free(FLAGS.workdir, "workdir")
    request = from_hf.Request(
        checkpoint=FLAGS.checkpoint,
        workdir=FLAGS.workdir,
        config=common.load_config() if FLAGS.config is not None else None,
        dtype=FLAGS.dtype,
        mesh=common.parse_mesh(FLAGS.mesh) if FLAGS.mesh else None,
    )
    source = from_hf.read(FLAGS.checkpoint)
    config = from_hf.config_of(source, request)
    common.start_hosts(config)
    say = lambda line: print(line, flush=True) if distributed.is_primary() else None
    from_hf.convert(source, config, request, say)
    say(
        f"{FLAGS.workdir} holds a {source.family.architecture}; next, try\n"
        f"  moe-jax generate --workdir={FLAGS.workdir} --prompt='...'\n"
        f"  moe-jax train --workdir={FLAGS.workdir}"
    )
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
