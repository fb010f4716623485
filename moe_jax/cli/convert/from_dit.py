"""Makes a workdir of a checkpoint of DiT or DiT-MoE.

Example:
  moe-jax convert from-dit --file=model.safetensors --workdir=runs/s --config=my.py
  moe-jax sample --workdir=runs/s --npz=latents.npz --out=''

The file holds weights alone, under the names of the authors' code; the model and all
else come from --config, and the file is held to it. A .pt file becomes one by `moe-jax
convert pt-to-safetensors`. Nothing is written where a tensor is missing, left over,
misshapen or not finite.
"""

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config()
    common.define_hosts()
    flags.DEFINE_string("file", "", "Of tensors, in the safetensors format.")
    flags.DEFINE_string("workdir", "", "Folder to make; it must not be there yet.")
    flags.DEFINE_enum(
        "dtype", "", ["", "float32", "bfloat16"], "Of the parameters; default: config."
    )
    flags.DEFINE_string(
        "mesh", "", "Mesh to lay it out on, as expert=4,fsdp=2; default: of the config."
    )


def main() -> int:
    from moe_jax.convert import from_dit, target
    from moe_jax.parallel import distributed

    if not FLAGS.file:
        raise UserError("--file is missing: a safetensors file of DiT or DiT-MoE")
    target.check_free(FLAGS.workdir, "workdir")
    request = from_dit.Request(
        file=FLAGS.file,
        workdir=FLAGS.workdir,
        config=common.load_config(),
        dtype=FLAGS.dtype,
        mesh=common.parse_mesh(FLAGS.mesh) if FLAGS.mesh else None,
    )
    tensors = from_dit.read(FLAGS.file)
    config = from_dit.config_of(request)
    common.start_hosts(config)
    say = lambda line: print(line, flush=True) if distributed.is_primary() else None
    from_dit.convert(tensors, config, request, say)
    pixels = config.model.in_channels in (1, 3)
    files = "" if pixels else " --npz=latents.npz --out=''"
    say(
        f"{FLAGS.workdir} is ready; next, try\n"
        f"  moe-jax sample --workdir={FLAGS.workdir}{files}\n"
        f"  moe-jax train --workdir={FLAGS.workdir}"
    )
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
