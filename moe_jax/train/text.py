"""Runs on text: what fits, what is scored, and the end of a run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from moe_jax.config import Config
from moe_jax.data import baselines
from moe_jax.errors import UserError
from moe_jax.infer import texts
from moe_jax.infer.generate import Sampling
from moe_jax.observe.experts import expert_table
from moe_jax.parallel import distributed
from moe_jax.train.evaluate import Evaluator, typical_tokens
from moe_jax.train.kinds import Kind
from moe_jax.train.recorder import Recorder
from moe_jax.train.setup import Parts


def check(config: Config, data: Any) -> None:
    """Raises UserError where the tokenizer has more ids than the model."""
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"--config.model.vocab_size={config.model.vocab_size} is smaller than the "
            f"tokenizer's {data.vocab_size} ids; set it to {data.vocab_size} or, for "
            f"even tiles, {-(-data.vocab_size // 128) * 128}"
        )


def of_loss(data: Any) -> Callable[[float], dict[str, float]]:
    """Bits per byte of the training text, by the loss in nats per token."""
    nats_to_bits = 1 / (math.log(2) * data.bytes_per_token("train"))
    return lambda loss: {"bits_per_byte": loss * nats_to_bits}


def line(figures: dict[str, Any]) -> str:
    """Held-out figures for people."""
    return (
        f"loss {figures['loss']:.4f}  perplexity {figures['perplexity']:.2f}  "
        f"bpb {figures['bits_per_byte']:.3f}"
    )


def finish(
    parts: Parts,
    data: Any,
    evaluator: Evaluator,
    recorder: Recorder,
    progress: Any,
    folder: str,
) -> dict[str, Any]:
    """Evaluates, prints what was learned, and returns the figures of summary.json."""
    config, note = parts.config, recorder.console.note
    held_out = evaluator.score(progress.state, data)
    recorder.held_out(progress.step, held_out)
    compared = {}
    if config.eval.baselines and held_out and distributed.is_primary():
        if data.all_scored:
            compared = _baselines(data)
            for line in _comparison(held_out["bits_per_byte"], compared):
                note(line)
        else:
            note("no baselines: they would score more than the answers")
    uses_lev = evaluator.expert_uses(progress.state, data)
    if uses_lev is not None:
        decode = lambda ids: data.tokenizer.decode(ids).decode("utf-8", "replace")
        note(expert_table(uses_lev.sum(-1), typical_tokens(uses_lev), decode))
    for line in recorder.loads.lines():
        note(line)
    for number, text in enumerate(_samples(parts, data, progress.state), 1):
        note(f"--- sample {number} ---\n{text}")
    note(
        f"done: {progress.step} steps; next, try\n"
        f"  moe-jax generate --workdir={folder} --prompt='def '\n"
        f"  moe-jax eval --workdir={folder}\n"
        f"  pip install tensorboard && tensorboard --logdir={folder}/tensorboard"
    )
    return {
        "step": progress.step,
        "held_out": held_out,
        "baselines": compared,
        "compile_seconds": progress.compile_seconds,
        "mesh": dict(parts.mesh.shape),
    } | recorder.totals()


def _baselines(data: Any) -> dict[str, float]:
    return {
        "gzip": baselines.gzip_bits_per_byte(data.documents("validation")),
        "order2": baselines.order2_bits_per_byte(
            data.documents("train"), data.documents("validation")
        ),
    }


def _comparison(own: float, compared: dict[str, float]) -> Iterator[str]:
    names = {"gzip": "gzip -9", "order2": "order-2 byte model (Witten-Bell)"}
    yield "bits per byte of the held-out text (less is better):"
    yield f"  {own:.3f}  this model"
    for name, value in compared.items():
        yield f"  {value:.3f}  {names[name]}"


def _samples(parts: Parts, data: Any, state: Any) -> Iterator[str]:
    options = parts.config.eval
    if not options.samples:
        return
    with jax.set_mesh(parts.mesh):
        yield from texts.write(
            parts,
            data.tokenizer,
            state.eval_params,
            state.router_state,
            [options.prompt] * options.samples,
            max_new_tokens=options.sample_tokens,
            sampling=Sampling(temperature=0.8, top_p=0.95),
            seed=parts.config.seed,
        )


KIND = Kind(
    unit="tokens",
    check=check,
    evaluator=lambda parts, data: Evaluator(parts, data.bytes_per_token("validation")),
    of_loss=of_loss,
    line=line,
    finish=finish,
)
