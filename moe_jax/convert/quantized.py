"""Quantised tensors of published checkpoints, as the float32 numbers they stand for.

- FP8 (DeepSeek-V3): `x` in e4m3, `x_scale_inv` in float32, one scale for each block of
  128 x 128 entries, which it multiplies.
- MXFP4 (GPT-OSS; OCP Microscaling Formats 1.0): `x_blocks` holds pairs of e2m1 numbers
  in bytes, the first in the low half, `x_scales` the exponent (less 127) of a power of
  two for each 32 of them. Stored is (E, out, in), what `x` stands for is (E, in, out).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.convert.tensor_file import Stored
from moe_jax.errors import UserError

FP8_SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
# The positive e2m1 numbers by their code; the fourth bit is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_E2M1, *(-v for v in _E2M1)], np.float32)
_EXPONENT_BIAS = 127


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, however it is stored.

    Attributes:
      name: of the tensor.
      path: of the file that holds it, or its first part.
      shape: of the tensor.
      type_name: in which it is stored, one of `tensor_file.TYPES`.
      array: reads it; of a tensor that is not quantised a map of the file.
      quantized: "", "FP8" or "MXFP4".
    """

    name: str
    path: str
    shape: tuple[int, ...]
    type_name: str
    array: Callable[[], np.ndarray]
    quantized: str = ""


def from_fp8(weight: np.ndarray, scale: np.ndarray, block: Sequence[int]) -> np.ndarray:
    """Multiplies blocks by their scales.

    Args:
      weight: (M, N), float8.
      scale: (ceil(M / m), ceil(N / n)) float32.
      block: (m, n).

    Returns:
      (M, N) float32.
    """
    rows, columns = weight.shape
    found = weight.astype(np.float32)
    wide = np.repeat(np.asarray(scale, np.float32), block[1], axis=1)[:, :columns]
    for i in range(scale.shape[0]):
        found[i * block[0] : (i + 1) * block[0]] *= wide[i]
    return found.reshape(rows, columns)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Unpacks pairs of numbers and scales groups of them.

    Args:
      blocks: (..., G, 16) uint8.
      scales: (..., G) uint8.

    Returns:
      (..., 32 G) float32.
    """
    blocks = np.asarray(blocks)
    pairs = np.stack([_VALUES[blocks & 0xF], _VALUES[blocks >> 4]], axis=-1)
    exponents = np.asarray(scales).astype(np.int32) - _EXPONENT_BIAS
    groups = pairs.reshape(*blocks.shape[:-1], -1)
    scaled = np.ldexp(groups, exponents[..., None])
    return scaled.reshape(*blocks.shape[:-2], -1)


def whole(stored: Mapping[str, Stored], block: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, each with what belongs to it.

    Args:
      stored: what the files hold, by name.
      block: of FP8, entries that share a scale.

    Raises:
      UserError: a scale without its tensor, or the reverse, or shapes that do not fit.
    """
    found = {}
    for name, entry in stored.items():
        if name.endswith(FP8_SCALE) and name.removesuffix(FP8_SCALE) in stored:
            continue
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in stored:
            continue
        tensor = _tensor(name, entry, stored, block)
        found[tensor.name] = tensor
    return found


def _tensor(name, entry, stored, block) -> Tensor:
    if name.endswith(BLOCKS):
        return _mxfp4(name.removesuffix(BLOCKS), entry, stored)
    if entry.type_name == "F8_E4M3":
        return _fp8(name, entry, stored, block)
    return Tensor(name, entry.path, entry.shape, entry.type_name, entry.array)


def _fp8(name, entry, stored, block) -> Tensor:
    scale = stored.get(name + FP8_SCALE)
    if scale is None:
        raise UserError(f"{entry.path}: {name} is FP8 without {name}{FP8_SCALE}")
    if len(entry.shape) == 2:
        expected = tuple(-(-n // b) for n, b in zip(entry.shape, block, strict=True))
    if len(entry.shape) != 2 or scale.shape != expected:
        raise UserError(
            f"{entry.path}: {name} {list(entry.shape)} does not fit its scales "
            f"{list(scale.shape)} of blocks {list(block)}"
        )
    read = lambda: from_fp8(entry.array(), scale.array(), block)
    return Tensor(name, entry.path, entry.shape, entry.type_name, read, "FP8")


def _mxfp4(name, entry, stored) -> Tensor:
    scales = stored.get(name + SCALES)
    if scales is None:
        raise UserError(f"{entry.path}: {name}{BLOCKS} without {name}{SCALES}")
    shape = entry.shape
    fits = len(shape) == 4 and shape[:3] == scales.shape and shape[3] == 16
    if not fits or {entry.type_name, scales.type_name} != {"U8"}:
        raise UserError(
            f"{entry.path}: {name}{BLOCKS} {entry.type_name}{list(shape)} does not fit "
            f"its scales {scales.type_name}{list(scales.shape)}"
        )
    experts, out, groups, half = shape
    read = lambda: from_mxfp4(entry.array(), scales.array()).swapaxes(1, 2)
    whole_shape = (experts, groups * half * 2, out)
    return Tensor(name, entry.path, whole_shape, entry.type_name, read, "MXFP4")
