"""Trains a model, or goes on where the workdir stopped.

Example:
  moe-jax train --config=configs/quickstart.py --workdir=runs/quickstart
  moe-jax train --workdir=runs/quickstart

Without --config it is that of the workdir, which must hold a run or an imported model.

Any value of the config can be overridden: --config.optimizer.learning_rate=3e-4.
Ctrl-C and SIGTERM save a checkpoint first; the same command then goes on.
"""

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config()
    common.define_hosts()
    flags.DEFINE_string("workdir", "", "Folder of the run.")


def main() -> int:
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: the folder that this run may write")
    config = common.load_config(FLAGS.workdir)
    common.start_hosts(config)
    from moe_jax.train import loop

    return loop.train(config, FLAGS.workdir)


if __name__ == "__main__":
    common.run(main, define_flags)
