"""Writes text from a checkpoint, token by token.

Example:
  moe-jax generate --workdir=runs/quickstart --prompt='def ' --tokens=300
"""

import codecs

from absl import flags

from moe_jax import config as config_lib
from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_hosts()
    common.define_workdir()
    flags.DEFINE_string("prompt", "", "What the text begins with.")
    flags.DEFINE_integer("tokens", 200, "New tokens, at most.", 1)
    flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: most likely.", 0.0)
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely; 0: from all.", 0)
    flags.DEFINE_float("top_p", 0.95, "Draw from the fewest that reach p.", 0.0, 1.0)
    flags.DEFINE_integer("seed", 0, "Of the draws.", 0)


def main() -> int:
    config = common.read_workdir_config()
    config_lib.require_kind(config, "text", "moe-jax generate")
    common.start_hosts(config)
    import jax

    from moe_jax.data import tokenizers
    from moe_jax.infer import load, texts
    from moe_jax.infer.generate import Sampling
    from moe_jax.observe.console import printable

    if FLAGS.top_p == 0.0:
        raise UserError("--top_p=0.0: must lie in (0, 1]; for the most likely token "
                        "set --temperature=0")  # fmt: skip
    tokenizer = tokenizers.make_tokenizer(config.data.tokenizer)
    loaded = load.load(FLAGS.workdir, config, FLAGS.step)
    for line in loaded.notes:
        common.note(line)
    with jax.set_mesh(loaded.parts.mesh):
        new_ids = texts.stream(
            loaded.parts,
            tokenizer,
            loaded.state.eval_params,
            loaded.state.router_state,
            [FLAGS.prompt],
            max_new_tokens=FLAGS.tokens,
            sampling=Sampling(
                temperature=FLAGS.temperature, top_k=FLAGS.top_k, top_p=FLAGS.top_p
            ),
            seed=FLAGS.seed,
        )
        # A character may span several tokens: it is shown when it is whole.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for (ids,) in new_ids:
            if jax.process_index() == 0:
                text = decoder.decode(tokenizer.decode(ids))
                print(printable(text), end="", flush=True)
    if jax.process_index() == 0:
        print()
    return 0


if __name__ == "__main__":
    common.run(main, define_flags)
