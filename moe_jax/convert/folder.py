"""A folder of a Hugging Face model: config, tensors, and what lies beside them."""

import json
import os
import pathlib
import shutil
from typing import Any

from moe_jax.convert import quantized, tensor_file
from moe_jax.convert.quantized import Tensor
from moe_jax.convert.tensor_file import Stored
from moe_jax.errors import UserError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What is carried along: it belongs to the model and is not of tensors.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_QUANTIZED = ("fp8", "mxfp4")
_FP8_BLOCK = (128, 128)


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: there is none.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return found


def read_config(folder: str) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
      UserError: there is none, or its weights are quantised in a way not known here.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--checkpoint={folder}: no such folder")
    config = read_json(inside(folder, CONFIG))
    about = config.get("quantization_config") or {}
    if not isinstance(about, dict):
        raise UserError(f"{folder}/{CONFIG}: quantization_config must be an object")
    method = about.get("quant_method")
    if method is not None and method not in _QUANTIZED:
        raise UserError(
            f"{folder}/{CONFIG}: weights quantised by {method!r} are not read; "
            f"{' and '.join(_QUANTIZED)} are, and those that are not quantised"
        )
    return config


def read_tensors(folder: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a folder by name; headers are read and checked, no data.

    Raises:
      UserError: a file is missing or damaged, or differs from the index.
    """
    stored: dict[str, Stored] = {}
    for name, expected in _files(folder).items():
        path = inside(folder, name)
        found = tensor_file.read_header(path)
        if expected is not None and found.keys() != expected:
            wrong = sorted(found.keys() ^ expected)
            where = "not there" if wrong[0] in expected else "not in the index"
            raise UserError(
                f"{path} differs from {INDEX}: {wrong[0]} is {where}"
                + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            )
        stored |= found
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    block = tuple(block or _FP8_BLOCK) if isinstance(block, list | None) else ()
    if len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(
            f"{folder}/{CONFIG}: weight_block_size must be two sizes of 1 or more"
        )
    return quantized.whole(stored, block)


def _files(folder: str) -> dict[str, set[str] | None]:
    """Names of the files, and of the tensors that the index has in them."""
    if os.path.exists(os.path.join(folder, SINGLE)):
        return {SINGLE: None}
    path = os.path.join(folder, INDEX)
    if not os.path.exists(path):
        raise UserError(
            f"--checkpoint={folder}: neither {SINGLE} nor {INDEX} is there; weights in "
            "other formats (.bin, .pt) are not read, save them as safetensors first"
        )
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            raise UserError(f"{path}: {tensor} is in {name!r}, which is no file name")
        files.setdefault(name, set()).add(tensor)
    for name in files:
        if not os.path.exists(os.path.join(folder, name)):
            raise UserError(f"{folder}/{name} is missing; {INDEX} names it")
    return files


def inside(folder: str, name: str) -> str:
    """The path of a file of a folder, which does not lead out of it by links.

    A snapshot in the cache of Hugging Face's hub consists of links to the folder
    `blobs` beside it; these are followed.

    Raises:
      UserError: it leads elsewhere.
    """
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return path
    root, found = os.path.realpath(folder), os.path.realpath(path)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if not any(found.startswith(r.rstrip(os.sep) + os.sep) for r in roots):
        raise UserError(
            f"{path} is a link that leads out of the folder, to {found}; put a copy of "
            "the file there if it belongs to the model"
        )
    return path


def copy_beside(source: str, target: str) -> list[str]:
    """Copies tokenizer and the like; returns the names of the files."""
    names = [n for n in BESIDE if os.path.isfile(inside(source, n))]
    os.makedirs(target, exist_ok=True)
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    return names


def copy_config(source: str, target: str) -> None:
    """Keeps the config.json, whose other fields an export needs."""
    shutil.copyfile(os.path.join(source, CONFIG), os.path.join(target, CONFIG))
