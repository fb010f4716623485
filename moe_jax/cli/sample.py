"""Draws images from a checkpoint.

Example:
  moe-jax sample --workdir=runs/digits --class=3 --num=64 --guidance=2.0 --out=grid.png

Writes a grid as PNG, and with --npz the images themselves. Without --class the classes
come in turn, a column each. Prints how many network evaluations a batch took.
"""

import os
import tempfile

import numpy as np
from absl import flags

from moe_jax import config as config_lib
from moe_jax.cli import common
from moe_jax.errors import UserError

FLAGS = flags.FLAGS
SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpmpp", "deis")
GUIDANCES = ("cfg", "cfg++", "auto")
_AT_ONCE = 64


def define_flags() -> None:
    common.define_hosts()
    common.define_workdir()
    flags.DEFINE_integer("class", -1, "Class of all images; -1: all in turn.", -1)
    flags.DEFINE_integer("num", 64, "Images.", 1)
    flags.DEFINE_enum("sampler", "dpmpp", SAMPLERS, "The method.")
    flags.DEFINE_integer("steps", 20, "Its steps.", 1)
    flags.DEFINE_string("spacing", "even", "Of its times: even, ddim or karras.")
    flags.DEFINE_float("shift", 1.0, "Of the times of a flow.")
    flags.DEFINE_float("eta", 0.0, "Share of fresh noise of ddim.", 0.0, 1.0)
    flags.DEFINE_float("guidance", 1.0, "Scale; 1: none (with cfg++: 0 to 1).")
    flags.DEFINE_enum("guidance_kind", "cfg", GUIDANCES, "Which guidance.")
    flags.DEFINE_list("interval", [], "LOW,HIGH of the noise times with guidance.")
    flags.DEFINE_integer("guided_channels", 0, "First so many channels; 0: all.", 0)
    flags.DEFINE_integer("worse_top_k", 1, "Experts of auto's worse network.", 1)
    flags.DEFINE_integer("seed", 0, "Of the noise.", 0)
    flags.DEFINE_integer("batch", _AT_ONCE, "Images drawn at once.", 1)
    flags.DEFINE_string("out", "samples.png", "The grid; '' writes none.")
    flags.DEFINE_string("npz", "", "File for images and labels as arrays.")


def main() -> int:
    config = common.read_workdir_config()
    config_lib.require_kind(config, "images", "moe-jax sample")
    labels = _labels(config.model)
    _check_files()
    common.start_hosts(config)
    import jax

    from moe_jax.infer import load
    from moe_jax.infer.images import ImageSampler
    from moe_jax.quality import pictures

    sampler, guided_by = _method()
    loaded = load.load(FLAGS.workdir, config, FLAGS.step)
    for line in loaded.notes:
        common.note(line)
    batch = min(FLAGS.batch, len(labels))
    drawing = ImageSampler(loaded.parts, sampler, guided_by, batch)
    state, parts = loaded.state, []
    drawn = drawing.draw(state.eval_params, state.router_state, labels, FLAGS.seed)
    for part in drawn:
        parts.append(part)
        count = sum(len(images) for images, _ in parts)
        common.note(f"{count}/{len(labels)} images")
    if jax.process_index():
        return 0
    images = np.concatenate([images for images, _ in parts])
    if FLAGS.npz:
        _write_arrays(FLAGS.npz, images, labels)
    if FLAGS.out:
        classes = config.model.num_classes
        in_turn = FLAGS["class"].value < 0 and 4 < classes < 33
        grid = pictures.grid(images, columns=classes if in_turn else 0)
        pictures.write_png(FLAGS.out, grid)
    files = " and ".join(name for name in (FLAGS.out, FLAGS.npz) if name)
    print(f"{files}: {len(images)} images, {parts[0][1]} evaluations each")
    return 0


def _labels(model) -> np.ndarray:
    """(num,) int32; raises UserError for a class that there is not."""
    wanted = FLAGS["class"].value
    if wanted >= max(1, model.num_classes):
        raise UserError(
            f"--class={wanted}: the model knows "
            + (f"0 to {model.num_classes - 1}" if model.num_classes else "no classes")
        )
    if wanted >= 0:
        return np.full(FLAGS.num, wanted, np.int32)
    return (np.arange(FLAGS.num) % max(1, model.num_classes)).astype(np.int32)


def _check_files() -> None:
    if not FLAGS.out and not FLAGS.npz:
        raise UserError("--out='' and --npz='': nothing would be written; name a file")
    for name, ending in (("out", ".png"), ("npz", ".npz")):
        value = getattr(FLAGS, name)
        if value and not value.lower().endswith(ending):
            raise UserError(f"--{name}={value}: must end in {ending}")


def _method():
    """The sampler and the guidance that the flags describe."""
    from moe_jax.diffusion import guidance, samplers

    by_name = {
        "ddpm": samplers.ddpm.DDPM,
        "ddim": samplers.ddim.DDIM,
        "euler": samplers.euler.Euler,
        "heun": samplers.heun.Heun,
        "dpmpp": samplers.dpm_solver.DPMSolverPP,
        "deis": samplers.deis.DEIS,
    }
    kind = by_name[FLAGS.sampler]
    given = dict(steps=FLAGS.steps, spacing=FLAGS.spacing, shift=FLAGS.shift)
    given["eta"] = FLAGS.eta
    unknown = [name for name in given if name not in kind.__dataclass_fields__]
    for name in unknown:
        if FLAGS[name].value != FLAGS[name].default:
            raise UserError(f"--{name}={FLAGS[name].value}: {FLAGS.sampler} has none")
    sampler = kind(**{n: v for n, v in given.items() if n not in unknown})
    return sampler, _guidance(guidance)


def _guidance(guidance):
    kind, scale = FLAGS.guidance_kind, FLAGS.guidance
    if kind != "auto" and FLAGS.worse_top_k != FLAGS["worse_top_k"].default:
        raise UserError(f"--worse_top_k={FLAGS.worse_top_k}: is for auto guidance")
    if kind != "cfg" and FLAGS.guided_channels:
        raise UserError(f"--guided_channels={FLAGS.guided_channels}: is for cfg")
    if kind == "cfg++":
        if FLAGS.interval:
            raise UserError("--interval: cfg++ has none")
        return guidance.CFGPlusPlus(scale=scale)
    if scale == 1.0:
        return guidance.Unguided()
    low, high = _interval()
    if kind == "auto":
        return guidance.Autoguidance(
            scale=scale, low=low, high=high, top_k=FLAGS.worse_top_k
        )
    return guidance.ClassifierFree(
        scale=scale, low=low, high=high, channels=FLAGS.guided_channels
    )


def _interval() -> tuple[float, float]:
    if not FLAGS.interval:
        return 0.0, 0.0
    try:
        low, high = map(float, FLAGS.interval)
    except ValueError:
        raise UserError(
            f"--interval={','.join(FLAGS.interval)}: must be LOW,HIGH, noise times "
            "from 0 (data) to 1 (noise)"
        ) from None
    return low, high


def _write_arrays(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes both into one file, whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            np.savez(file, images=images, labels=labels)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"--npz={path} cannot be written: {error}") from None


if __name__ == "__main__":
    common.run(main, define_flags)
