"""Runs on images: what fits, what is scored, and the end of a run."""

from typing import Any

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.train.kinds import Kind


def check(config: Config, data: Any) -> None:
    """Raises UserError where the model takes other images or classes."""
    model, shape = config.model, tuple(data.image_shape)
    wanted = model.row_shapes(config.data)["images"][0]
    if shape != wanted:
        names = ("height", "width", "channels")
        shown = lambda size: ", ".join(f"{n} {s}" for n, s in zip(names, size))  # noqa: B905
        raise UserError(
            f"--config.model.image_size={model.image_size}, in_channels="
            f"{model.in_channels}: the images have {shown(shape)}; set the model's to "
            "those, or change the images by config.data.image_size and channels"
        )
    classes = data.num_classes if data.num_classes > 1 else 0
    if model.num_classes != classes:
        raise UserError(
            f"--config.model.num_classes={model.num_classes}: the images have "
            f"{classes or 'no'} classes; set it to {classes}"
        )


def line(figures: dict[str, Any]) -> str:
    """Held-out figures for people."""
    return f"loss {figures['loss']:.4f}"


KIND = Kind(
    unit="images",
    check=check,
    evaluator=None,
    of_loss=lambda data: lambda loss: {},
    line=line,
    finish=None,
)
