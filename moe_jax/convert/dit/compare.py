"""What a file's tensors say about its model, beside what a config says.

Such files hold no config: sizes are read off the tensors' shapes, so that a config
that is another model's is refused in terms of its own fields.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.convert import mapping
from moe_jax.convert.dit.table import POSITIONS
from moe_jax.convert.mapping import Place
from moe_jax.convert.quantized import Tensor
from moe_jax.errors import UserError
from moe_jax.models.dit_config import DiT
from moe_jax.moe.layer import MoE
from moe_jax.nn import images

_SHOWN = 8
# Files hold the table rounded to their type, from angles that others rounded too.
_TOLERANCE = {"F64": 1e-6, "F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}


def positions(options: DiT) -> np.ndarray:
    """(1, N, D) float64, the fixed table that files hold and models here do not."""
    side = options.image_size // options.patch_size
    return images.positions_2d(side, side, options.d_model)[None]


def check(
    wanted: Sequence[Place], tensors: Mapping[str, Tensor], options: DiT, path: str
) -> None:
    """Compares a file with what a model takes.

    Args:
      wanted: all that it takes, but for the positions.
      tensors: of the file.
      options: of the model.
      path: of the file, for messages.

    Raises:
      UserError: sizes differ; tensors are missing or left over, by name; one has
        another shape, is no floating point tensor, or is not the table of positions.
    """
    found, asked = of_file(tensors), of_config(options)
    lines = [
        f"  {_FIELDS[name]}: {found[name]} in the file, {asked[name]} in the config"
        for name in _FIELDS
        if found.get(name) is not None and found[name] != asked[name]
    ]
    if lines:
        raise UserError(f"{path} is another model than --config:\n" + "\n".join(lines))
    names = {place.hub for place in wanted} | {POSITIONS}
    lines = _names("missing in the file", names - tensors.keys())
    lines += _names("without a place in the model", tensors.keys() - names)
    if lines:
        raise UserError(f"{path} does not fit --config:\n" + "\n".join(lines))
    for place in wanted:
        tensor = tensors[place.hub]
        if tensor.shape != place.hub_shape:
            raise UserError(
                f"{path}: {place.hub} has the shape {list(tensor.shape)}, but the "
                f"config asks for {list(place.hub_shape)}"
            )
        mapping.check_type(tensor)
    _check_positions(tensors[POSITIONS], options)


def _names(what: str, names: set[str]) -> list[str]:
    shown = sorted(names, key=_natural)
    more = [f"  ... and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return [f"  {what}: {name}" for name in shown[:_SHOWN]] + more


def _natural(name: str) -> list[Any]:
    return [(len(part), part) for part in name.split(".")]


def _check_positions(tensor: Tensor, options: DiT) -> None:
    mapping.check_type(tensor)
    table = positions(options)
    if tensor.shape != table.shape:
        raise UserError(
            f"{tensor.path}: {POSITIONS} has the shape {list(tensor.shape)}, but the "
            f"config asks for {list(table.shape)}"
        )
    worst = float(np.max(np.abs(tensor.array().astype(np.float64) - table)))
    # A comparison that also fails where it is not a number.
    if not worst <= _TOLERANCE.get(tensor.type_name, 1e-3):
        raise UserError(
            f"{tensor.path}: {POSITIONS} is not the table of sines and cosines of "
            f"models here (off by {worst:.2g}); learned positions are not supported"
        )


_FIELDS = {
    "num_layers": "model.num_layers",
    "d_model": "model.d_model",
    "num_heads": "model.num_heads",
    "patch_size": "model.patch_size",
    "in_channels": "model.in_channels",
    "image_size": "model.image_size",
    "learned_variance": "model.learned_variance",
    "classes": "model.num_classes (and one more where condition_dropout is above 0)",
    "qk_norm": "model.qk_norm",
    "mlp": "width of a dense feed-forward",
    "experts": "model.feed_forward.num_experts",
    "expert_width": "model.feed_forward.experts.d_ff",
    "shared": "model.feed_forward.shared_d_ff",
    "moe_blocks": "blocks with experts",
}


def of_file(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes by the keys of `_FIELDS`; None where a tensor that tells is not there."""

    def size(name: str, dim: int, rank: int = 2) -> int | None:
        shape = tensors[name].shape if name in tensors else ()
        return shape[dim] if len(shape) == rank else None

    layers = _numbers(r"blocks\.(\d+)\.", tensors)
    moe = _numbers(r"blocks\.(\d+)\.moe\.", tensors)
    dense = _numbers(r"blocks\.(\d+)\.mlp\.", tensors)
    experts = _numbers(r"blocks\.\d+\.moe\.experts\.(\d+)\.", tensors)
    in_moe = f"blocks.{moe[0]}.moe." if moe else ""
    width, channels, patch = (size("x_embedder.proj.weight", i, 4) for i in range(3))
    found = {
        "num_layers": layers[-1] + 1 if layers else None,
        "d_model": width,
        "num_heads": None,
        "patch_size": patch,
        "in_channels": channels,
        "classes": size("y_embedder.embedding_table.weight", 0) or 0,
        "qk_norm": "layer" if "blocks.0.attn.q_norm.weight" in tensors else "none",
        "mlp": size(f"blocks.{dense[0]}.mlp.fc1.weight", 0) if dense else None,
        "experts": experts[-1] + 1 if experts else None,
        "expert_width": size(f"{in_moe}experts.0.gate_proj.weight", 0),
        "shared": size(f"{in_moe}shared_experts.gate_proj.weight", 0),
        "moe_blocks": moe,
    }
    if width and (head := size("blocks.0.attn.q_norm.weight", 0, 1)):
        found["num_heads"] = width // head
    if patch and channels:
        tokens = size(POSITIONS, 1, 3)
        found["image_size"] = tokens and math.isqrt(tokens) * patch
        out = size("final_layer.linear.weight", 0)
        found["learned_variance"] = out and out == 2 * channels * patch**2
    return found


def of_config(options: DiT) -> dict[str, Any]:
    """The same of a config."""
    ff, sizes = options.feed_forward, {}
    if isinstance(ff, MoE):
        layers = range(ff.first_dense, options.num_layers)
        sizes = {
            "mlp": ff.dense_d_ff,
            "experts": ff.num_experts,
            "expert_width": ff.experts.d_ff,
            "shared": ff.shared_d_ff,
            "moe_blocks": [
                i for i in layers if (i - ff.first_dense + 1) % ff.every == 0
            ],
        }
    else:
        sizes = dict(mlp=ff.d_ff, experts=0, expert_width=0, shared=0, moe_blocks=[])
    names = ("num_layers", "d_model", "num_heads", "patch_size", "in_channels")
    names += ("image_size", "learned_variance", "qk_norm")
    classes = options.num_classes + (options.condition_dropout > 0)
    return {
        **{name: getattr(options, name) for name in names},
        "classes": classes if options.num_classes else 0,
        **sizes,
    }


def _numbers(pattern: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """All numbers that names have in one place, ascending."""
    found = (re.match(pattern, name) for name in tensors)
    return sorted({int(match[1]) for match in found if match})
