"""The end of a run: scores, baselines, experts, samples, and what to do next."""

from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.data import baselines
from moe_jax.infer import texts
from moe_jax.infer.generate import Sampling
from moe_jax.observe.experts import expert_table
from moe_jax.parallel import distributed
from moe_jax.train.evaluate import Evaluator, typical_tokens
from moe_jax.train.recorder import Recorder
from moe_jax.train.setup import Parts


def show(
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
