"""Runs on images: what fits, what is scored, and the end of a run."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.infer.images import ImageSampler, classes_in_turn
from moe_jax.observe.experts import expert_table
from moe_jax.parallel import distributed
from moe_jax.quality import (
    classifier,
    expert_use,
    frechet,
    heat_maps,
    pictures,
    samples,
)
from moe_jax.train.evaluate_images import BINS, ImageEvaluator, Uses
from moe_jax.train.kinds.base import Kind
from moe_jax.train.recorder import Recorder
from moe_jax.train.setup import Parts

SAMPLES_FILE = "samples.png"
_DRAWN_AT_ONCE = 256
# Training images that a classifier sees, and that samples are compared with.
_MOST_COMPARED = 50_000


def check(config: Config, data: Any) -> None:
    """Raises UserError where the model takes other images or classes."""
    model, shape = config.model, tuple(data.image_shape)
    if shape != model.row_shapes(config.data)["images"][0]:
        height, width, channels = shape
        raise UserError(
            f"--config.model.image_size={model.image_size}, in_channels="
            f"{model.in_channels}: the images are {height} x {width} with {channels} "
            "channels; set the model's to those, or change the images by "
            "config.data.image_size and config.data.channels"
        )
    classes = data.num_classes if data.num_classes > 1 else 0
    if model.num_classes not in (0, classes):
        raise UserError(
            f"--config.model.num_classes={model.num_classes}: the images have "
            f"{classes or 'no'} classes; set it to {classes}"
        )
    if config.eval.judged:
        _check_judged(config.eval.judged, classes, data.num_rows("validation"))


def _check_judged(count: int, classes: int, held_out: int) -> None:
    """Whether samples can be compared, before a run that ends with it."""
    why = ""
    features = classifier.num_features(min(held_out, _MOST_COMPARED))
    fewest = frechet.FEWEST_PER_FEATURE * features
    if not classes:
        why = "samples are compared by a classifier, and the images have no classes"
    elif held_out < fewest:
        why = f"{held_out} held-out images are too few to compare with"
    elif count < fewest:
        why = (
            f"too few to compare; beside {held_out} held-out images {fewest} are "
            "needed at least"
        )
    if why:
        raise UserError(f"--config.eval.judged={count}: {why}; 0 compares none")


def line(figures: dict[str, Any]) -> str:
    """Held-out figures for people."""
    by_time = "  ".join(f"{loss:.3f}" for loss in figures["by_time"])
    return (
        f"loss {figures['loss']:.4f} +- {figures['error']:.4f}; by noise time from "
        f"data to noise: {by_time}"
    )


def finish(
    parts: Parts,
    data: Any,
    evaluator: ImageEvaluator,
    recorder: Recorder,
    progress: Any,
    folder: str,
) -> dict[str, Any]:
    """Evaluates, shows what was learned, and returns the figures of summary.json."""
    options, note = parts.config.eval, recorder.console.note
    held_out = evaluator.score(progress.state, data)
    recorder.held_out(progress.step, held_out)
    if options.bits:
        found = evaluator.bits(progress.state, data, options.bits)
        held_out |= found
        note(f"bits per dimension: {found.get('bits_per_dimension', np.nan):.3f}")
    uses = evaluator.expert_uses(progress.state, data)
    if uses is not None and distributed.is_primary():
        for text in _experts(parts, uses, recorder, progress.step, folder):
            note(text)
    for text in recorder.loads.lines():
        note(text)
    judged = _draw(parts, data, recorder, progress, folder)
    note(
        f"done: {progress.step} steps; next, try\n"
        f"  moe-jax sample --workdir={folder} --num=64 --guidance=2.0\n"
        f"  moe-jax eval --workdir={folder}\n"
        f"  pip install tensorboard && tensorboard --logdir={folder}/tensorboard"
    )
    return {
        "step": progress.step,
        "held_out": held_out,
        "samples": judged,
        "compile_seconds": progress.compile_seconds,
        "mesh": dict(parts.mesh.shape),
    } | recorder.totals()


def _experts(
    parts: Parts, uses: Uses, recorder: Recorder, step: int, folder: str
) -> Iterator[str]:
    """Tables for the console; pictures of the same go to the workdir."""
    model = parts.config.model
    yield expert_table(uses.image_nle.sum(0))
    by_time = expert_use.by_group(uses.image_nle, uses.bin_n, BINS)
    told = {
        "time": expert_use.of_images(uses.image_nle, uses.bin_n, BINS),
        "position": expert_use.of_counts(uses.position_lep),
    }
    names = [f"{i / BINS:.1f}" for i in range(BINS)]
    drawn = {"time": heat_maps.by_group(by_time, "Experts by noise time", names)}
    side = model.image_size // model.patch_size
    drawn["position"] = heat_maps.by_position(
        uses.position_lep, side, side, "Experts by position"
    )
    if model.num_classes:
        given = (uses.image_nle, uses.class_n, model.num_classes)
        told["class"] = expert_use.of_images(*given)
        names = [str(i) for i in range(model.num_classes)]
        counts = expert_use.by_group(*given)
        drawn["class"] = heat_maps.by_group(counts, "Experts by class", names)
    yield expert_use.table(told)
    for name, picture in drawn.items():
        pictures.write_png(os.path.join(folder, f"experts_by_{name}.png"), picture)
        recorder.image(step, f"experts/{name}", picture)


def _draw(parts: Parts, data: Any, recorder: Recorder, progress: Any, folder: str):
    """The grid of samples, and their comparison with real images by name."""
    options, config = parts.config.eval, parts.config
    wanted = options.samples + options.judged
    if not wanted:
        return {}
    sampler = ImageSampler(
        parts, options.sampler, options.guidance, min(wanted, _DRAWN_AT_ONCE)
    )
    classes = config.model.num_classes
    labels = np.concatenate(
        [classes_in_turn(n, classes) for n in (options.samples, options.judged)]
    )
    state, images = progress.state, []
    drawn = sampler.draw(state.eval_params, state.router_state, labels, config.seed)
    for part, _ in drawn:
        images.append(part)
    if not distributed.is_primary():
        return {}
    images = np.concatenate(images)
    shown, compared = images[: options.samples], images[options.samples :]
    if len(shown) and images.shape[-1] in (1, 3):
        picture = pictures.grid(shown, columns=classes if 4 < classes < 33 else 0)
        path = os.path.join(folder, SAMPLES_FILE)
        pictures.write_png(path, picture)
        recorder.image(progress.step, "samples", picture)
        recorder.console.note(f"samples: {path}")
    if not len(compared):
        return {}
    found = _judged(compared, labels[options.samples :] if classes else None, data)
    recorder.console.note(str(found))
    return found.figures()


def _judged(images: np.ndarray, labels: np.ndarray | None, data: Any):
    real = {}
    for split in ("train", "validation"):
        count = min(data.num_rows(split), _MOST_COMPARED)
        real[split] = data.rows(split, range(count))
    features = classifier.num_features(len(real["validation"]["labels"]))
    judge = classifier.train(
        real["train"]["images"],
        real["train"]["labels"],
        data.num_classes,
        num_features=features,
    )
    return samples.judge(
        judge,
        images,
        labels,
        real["train"]["images"],
        real["validation"]["images"],
        real["validation"]["labels"],
    )


KIND = Kind(
    unit="images",
    check=check,
    evaluator=lambda parts, data: ImageEvaluator(parts),
    of_loss=lambda data: lambda loss: {},
    line=line,
    finish=finish,
)
