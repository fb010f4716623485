"""Shows what a run was trained on: whether each row came once in every pass.

Example:
  moe-jax train --config=my.py --workdir=runs/q --config.train.ledger=true
  moe-jax ledger --workdir=runs/q

Reads what each process wrote down as it read, in the ledger folder of the workdir; the
run may have been resumed on other hosts. The exit status is 1 where a row is missing or
came twice.
"""

from absl import flags

from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", "", "Folder of the run.")


def main() -> int:
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: the folder of a run of moe-jax train")
    from moe_jax.data import pipeline
    from moe_jax.observe import ledger
    from moe_jax.train import workdir

    config = workdir.read_config(FLAGS.workdir)
    steps = ledger.read(FLAGS.workdir)
    problems = ledger.gaps(steps, config.train.batch_size)
    sizes = pipeline.prepare(config).source_rows("train")
    for source, (name, size) in enumerate(sizes):
        counts = ledger.passes(steps, source, size)
        problems += [f"{name}: {line}" for line in counts.problems]
        print(
            f"{name}: {counts.rows:,} rows read of {size:,}: {counts.whole} whole "
            f"passes and {counts.rows - counts.whole * size:,} rows of another"
        )
    for line in problems:
        print(f"WRONG: {line}")
    last = max(steps)
    print(f"{last} steps" if problems else f"{last} steps: each row once in each pass")
    return 1 if problems else 0


if __name__ == "__main__":
    common.run(main, define_flags)
