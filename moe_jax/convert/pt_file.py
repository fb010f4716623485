"""Tensors of a torch checkpoint, written as a safetensors file.

Needs torch, which the rest of the project does not. Only tensors and plain values are
unpickled (`weights_only`), never code.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.convert import target, tensor_file
from moe_jax.errors import UserError, nearest


def convert(
    path: str,
    out: str,
    *,
    key: str = "",
    prefix: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Writes the tensors of one dict of a checkpoint.

    Args:
      path: of the checkpoint, as `torch.save` wrote it.
      out: the file, which is not there yet.
      key: of the dict inside, as "ema"; "": the checkpoint itself.
      prefix: that all names begin with and lose.
      say: shows a line to the user.

    Raises:
      UserError: torch is missing, the file is no checkpoint or holds more than tensors,
        there is no such dict, or the new file cannot be written.
    """
    found = _named(_picked(_loaded(path), key, path), prefix, path)
    arrays = {name: _array(tensor, name, path) for name, tensor in found.items()}
    with target.file_made_whole(out, "out") as made:
        tensor_file.save(made, arrays)
    size = sum(array.nbytes for array in arrays.values())
    say(f"{out}: {len(arrays)} tensors, {size:,} bytes")


def _loaded(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "pt-to-safetensors needs torch to read such files: pip install torch"
        ) from None
    if not os.path.isfile(path):
        raise UserError(f"--file={path}: no such file")
    try:
        # Training scripts save their flags beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for damaged files
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} is no checkpoint of torch, or holds what is neither tensor nor "
            f"plain value: {said[0]}"
        ) from None


def _picked(found: Any, key: str, path: str) -> Mapping[str, Any]:
    """The dict of tensors that is asked for."""
    if key:
        if not isinstance(found, Mapping) or key not in found:
            names = [n for n in found if isinstance(n, str)][:8] if found else []
            raise UserError(
                f"--key={key}: {path} has none{nearest(key, names)} (it has: "
                f"{', '.join(names) or 'nothing'})"
            )
        found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path}: {key or 'it'} is no dict of tensors")
    inside = [n for n, value in found.items() if isinstance(value, Mapping)]
    if inside and not key:
        raise UserError(
            f"{path} holds several dicts; choose one by --key={inside[0]} (there are: "
            f"{', '.join(map(str, inside))})"
        )
    return found


def _named(found: Mapping[str, Any], prefix: str, path: str) -> dict[str, Any]:
    other = [name for name in found if not str(name).startswith(prefix)]
    if other:
        raise UserError(f"--prefix={prefix}: {path} has {other[0]!r}, without it")
    return {str(name)[len(prefix) :]: value for name, value in found.items()}


def _array(value: Any, name: str, path: str) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor):
        raise UserError(
            f"{path}: {name} is a {type(value).__name__}, no tensor; --key chooses a "
            "dict inside"
        )
    if value.is_sparse or value.is_quantized:
        raise UserError(f"{path}: {name} is sparse or quantised; save it dense")
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        array = value.numpy()
    except TypeError:
        array = None
    if array is None or array.dtype not in tensor_file.NAMES:
        raise UserError(f"{path}: {name} is of type {value.dtype}, not known here")
    return array
