"""Measures how fast the input pipeline gives batches, by itself.

Example:
  moe-jax bench data
  moe-jax bench data --config=configs/quickstart.py --lengths=1024,8192

Tokens a second of the config's own text (by default the source code of Python's
library, in bytes): from text to token file, and from the token file to batches, packed
in the caller's thread (rows), read ahead in the pipeline's thread as in training
(ahead), and made arrays over the devices as well (placed).
"""

import pathlib
import tempfile

from absl import flags

from moe_jax import config as config_lib
from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_config(default="configs/quickstart.py")
    flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "Tokens of a row.")
    flags.DEFINE_integer("tokens", 2**22, "Tokens of a timed run, about.", 1)
    flags.DEFINE_integer("repeats", 10, "Timed runs of each.", 1)
    common.define_json()


def main() -> int:
    config = common.load_config()
    config_lib.require_kind(config, "text", "moe-jax bench data")
    common.check_json()
    wrong = [text for text in FLAGS.lengths or [""] if not text.isdecimal()]
    if wrong or "0" in FLAGS.lengths:
        raise UserError(f"--lengths={','.join(FLAGS.lengths)}: numbers of 1 or more")
    lengths = [int(text) for text in FLAGS.lengths]
    from moe_jax.parallel import distributed

    distributed.start(config.mesh)
    from moe_jax.bench import data, timing
    from moe_jax.parallel import mesh as mesh_lib

    print(timing.describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokens, seconds = data.tokenise(config, pathlib.Path(folder))
    rate = tokens / seconds
    print(f"text to token file: {rate / 1e6:.2f} million tokens/s ({tokens:,} tokens)")
    mesh = mesh_lib.make_mesh(config.mesh)
    print(
        f"token file to batches, million tokens/s: median of {FLAGS.repeats} runs and "
        "the quartiles\n"
        f"{'row':>6}{'batch':>7}" + "".join(f"{s:>24}" for s in data.STAGES),
        flush=True,
    )
    found = []
    for row in data.measure(config, mesh, lengths, FLAGS.tokens, FLAGS.repeats):
        found.append(row)
        cells = "".join(f"{_rate(row, stage):>24}" for stage in data.STAGES)
        print(f"{row.sequence_length:>6}{row.batch_size:>7}{cells}", flush=True)
    common.write_json(
        {
            "machine": timing.machine(),
            "text": {"tokens": tokens, "seconds": seconds},
            "token_file": [_figures(row) for row in found],
        }
    )
    return 0


def _rate(row, stage: str) -> str:
    low, high = row.seconds[stage].quartiles
    shown = [row.tokens / seconds / 1e6 for seconds in (high, low)]
    return f"{row.rate(stage) / 1e6:.1f} ({shown[0]:.1f}-{shown[1]:.1f})"


def _figures(row):
    return {
        "sequence_length": row.sequence_length,
        "batch_size": row.batch_size,
        "tokens": row.tokens,
        "seconds": {stage: times.figures() for stage, times in row.seconds.items()},
    }


if __name__ == "__main__":
    common.run(main, define_flags, name="bench data")
