"""The folder of a run: the resolved config, and which runs may go on in it."""

import os

import jax

from moe_jax import config_json, models
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.observe.writers import write_atomically
from moe_jax.tree import named_leaves

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
_MOST_LINES = 12

# They decide which example comes when; a run that goes on must not change them.
_ORDER = (
    "config.seed",
    "config.train.batch_size",
    "config.data.source",
    "config.data.tokenizer",
    "config.data.sequence_length",
    "config.data.validation_fraction",
    "config.data.image_size",
    "config.data.channels",
    "config.data.labelled",
    "config.data.flip",
    "config.data.crop_padding",
)


def checkpoint_folder(workdir: str, config: Config) -> str:
    """Where the run's checkpoints are."""
    return config.checkpoint.folder or os.path.join(workdir, "checkpoints")


def read_config(workdir: str) -> Config:
    """The config that a workdir was trained with.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return config_json.from_json(file.read())
    except FileNotFoundError:
        raise UserError(
            f"--workdir={workdir}: no {CONFIG_FILE} there, so no run of moe-jax "
            "train; name the folder that was given to train"
        ) from None
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    init = models.build(config.model).init
    leaves = named_leaves(jax.eval_shape(init, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in leaves.items()}


def _shape_differences(old: Config, new: Config) -> list[str]:
    before, after = _shapes(old), _shapes(new)
    lines = []
    for name in sorted(before | after):
        a, b = before.get(name), after.get(name)
        if a != b:
            shown = lambda shape: "absent" if shape is None else str(shape)
            lines.append(f"{name}: {shown(a)} -> {shown(b)}")
    return lines


def _cut(lines: list[str]) -> str:
    more = len(lines) - _MOST_LINES
    shown = lines[:_MOST_LINES] + ([f"... and {more} more"] if more > 0 else [])
    return "\n".join(f"  {line}" for line in shown)


def check_resume(workdir: str, config: Config) -> list[str]:
    """Compares the config with that of the run in the workdir.

    Returns:
      Lines about what changed without harm.

    Raises:
      UserError: the parameters have other shapes, or the examples another order.
    """
    old = read_config(workdir)
    changed = config_json.differences(old, config)
    shapes = _shape_differences(old, config)
    if shapes:
        model = [line for line in changed if line.startswith("config.model")]
        raise UserError(
            f"--workdir={workdir} holds another model; take another folder, or give "
            f"this run the same model.\nConfig (there -> here):\n{_cut(model)}\n"
            f"Parameters:\n{_cut(shapes)}"
        )
    order = [line for line in changed if line.startswith(_ORDER)]
    if order:
        raise UserError(
            f"--workdir={workdir} saw its examples in another order, so it cannot go "
            "on exactly; keep these values, or begin a new folder with "
            f"--config.train.warm_start={workdir}\n{_cut(order)}"
        )
    return changed


def claim(workdir: str, config: Config) -> None:
    """Makes the folder and saves the resolved config in it.

    Raises:
      UserError: the folder cannot be made or written, or a class of the config is
        not one of moe_jax.
    """
    text = config_json.to_json(config)
    config_json.from_json(text)  # What cannot be read back must not be trained.
    try:
        os.makedirs(workdir, exist_ok=True)
        write_atomically(os.path.join(workdir, CONFIG_FILE), text)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from None
