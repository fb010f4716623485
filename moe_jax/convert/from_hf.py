"""A Hugging Face checkpoint becomes a workdir that training, scoring, writing take."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax import config as config_lib
from moe_jax.config import Config, MeshConfig
from moe_jax.convert import folder, load, mapping, new_run, run_config, target
from moe_jax.convert.hf import FAMILIES
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.convert.mapping import Place
from moe_jax.convert.quantized import Tensor
from moe_jax.errors import UserError, nearest
from moe_jax.models.decoder_config import Decoder
from moe_jax.parallel import distributed
from moe_jax.train import setup

# Beside the tokenizer: in which types the tensors were stored.
TYPES_FILE = "tensor_types.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      checkpoint: folder of the model.
      workdir: to be made.
      config: to run it with; None: `run_config.default`.
      dtype: of the parameters; "": as the config has it.
      mesh: to lay them out on; None: that of the config.
    """

    checkpoint: str
    workdir: str
    config: Config | None = None
    dtype: str = ""
    mesh: MeshConfig | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What a folder holds.

    Attributes:
      family: of the model.
      decoder: its config.
      ahead: modules that predict further tokens.
      longest: tokens of a text.
      tensors: by name.
      notes: lines about fields of config.json that are not used.
    """

    family: Family
    decoder: Decoder
    ahead: int
    longest: int
    tensors: Mapping[str, Tensor]
    notes: list[str]


def family_of(data: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
      UserError: it is none of those known.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={kind!r} is not known{nearest(str(kind), FAMILIES)} "
            f"(families: {', '.join(FAMILIES)})"
        )
    return FAMILIES[kind]


def read(checkpoint: str) -> Source:
    """Config and headers of a folder; no weights.

    Raises:
      UserError: it is of no family that is known, or damaged.
    """
    data = folder.read_config(checkpoint)
    where = os.path.join(checkpoint, folder.CONFIG)
    family = family_of(data, where)
    fields = Fields(data, where)
    try:
        decoder = family.decoder(fields)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        # A list where a number should be, a length of zero, and the like.
        raise UserError(
            f"{where}: is no config of {family.model_type}; a value is of another kind "
            f"({type(e).__name__}: {e})"
        ) from None
    ahead = fields.integer("num_nextn_predict_layers", 0) if family.ahead else 0
    longest = fields.integer("max_position_embeddings", 2048)
    tensors = folder.read_tensors(checkpoint, data)
    return Source(family, decoder, ahead, longest, tensors, fields.notes())


def config_of(source: Source, request: Request) -> Config:
    """The config that the workdir gets, validated.

    Raises:
      UserError: it breaks a rule.
    """
    if request.config is None:
        config = run_config.default(
            source.decoder, request.checkpoint, request.workdir, source.longest
        )
        wide = {t.type_name for t in source.tensors.values()} & {"F32", "F64"}
        config.model.dtype = "float32" if _most(source.tensors) in wide else "bfloat16"
    else:
        config = run_config.of_config(source.decoder, request.config)
    if request.dtype:
        config.model.param_dtype = request.dtype
    if request.mesh is not None:
        config.mesh = request.mesh
    return config_lib.validate(config)


def convert(
    source: Source, config: Config, request: Request, say: Callable[[str], None]
) -> None:
    """Makes the workdir.

    Args:
      source: of `read`.
      config: of `config_of`; JAX has been started for its mesh.
      request: what is asked for.
      say: shows a line to the user.

    Raises:
      UserError: a tensor is missing, left over, misshapen or not finite, or the folder
        cannot be written; there is none then.
    """
    parts = setup.make_parts(config)
    abstract = parts.abstract
    leaves = mapping.leaves_of(abstract.all_params, abstract.router_state)
    wanted = mapping.places(source.family, parts.model, leaves)
    lines = mapping.check(wanted, source.tensors, parts.model, source.ahead)
    for line in [*source.notes, *lines, *_about(source.tensors)]:
        say(line)
    with target.made_whole(request.workdir, "workdir") as made:
        with jax.set_mesh(parts.mesh):
            found = load.arrays(wanted, source.tensors, leaves)
        new_run.save(parts, found, made, request.checkpoint)
        if distributed.is_primary():
            _keep_beside(source, request, wanted, made)


def _keep_beside(source: Source, request: Request, wanted, made: str) -> None:
    kept = os.path.join(made, run_config.BESIDE)
    folder.copy_beside(request.checkpoint, kept)
    folder.copy_config(request.checkpoint, kept)
    with open(os.path.join(kept, TYPES_FILE), "w", encoding="utf-8") as file:
        json.dump(_types(wanted, source.tensors), file)


def _most(tensors: Mapping[str, Tensor]) -> str:
    """The type of most tensors; of those that are quantised bfloat16."""
    counts = collections.Counter(_unquantized(t) for t in tensors.values())
    return counts.most_common(1)[0][0]


def _unquantized(tensor: Tensor) -> str:
    return "BF16" if tensor.quantized else tensor.type_name


def _types(wanted: list[Place], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Types of tensors: the most common one, and those of all others by name."""
    most = _most(tensors)
    names = {place.hub for place in wanted}
    types = {name: _unquantized(tensors[name]) for name in sorted(names)}
    return {"most": most, "others": {n: t for n, t in types.items() if t != most}}


def _about(tensors: Mapping[str, Tensor]) -> list[str]:
    kinds = collections.Counter(t.quantized for t in tensors.values() if t.quantized)
    return [
        f"{count} tensors are {kind} and become whole numbers of floating point; an "
        "export writes them so"
        for kind, count in kinds.items()
    ]
