"""Scores a checkpoint on held-out data.

Example:
  moe-jax eval --workdir=runs/quickstart

Prints one line of JSON: of text the loss in nats per token, perplexity, bits per byte;
of images the denoising loss, also by time.
"""

import json

from absl import flags

from moe_jax.cli import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_hosts()
    common.define_workdir()
    flags.DEFINE_integer("max_batches", 0, "Batches to score; 0: all.", 0)


def main() -> int:
    config = common.read_workdir_config()
    common.start_hosts(config)
    import jax

    from moe_jax.data import pipeline
    from moe_jax.infer import load
    from moe_jax.parallel import distributed
    from moe_jax.train.kinds import kind_of

    data = pipeline.prepare(config)
    loaded = load.load(FLAGS.workdir, config, FLAGS.step, data.content_hash)
    for line in loaded.notes:
        common.note(line)
    evaluator = kind_of(config).evaluator(loaded.parts, data)
    figures = evaluator.score(loaded.state, data, FLAGS.max_batches)
    if distributed.is_primary():
        print(json.dumps({"step": int(jax.device_get(loaded.state.step))} | figures))
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
