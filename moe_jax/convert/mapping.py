"""Which tensor of the files is where in a model's leaves."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.table import Weight
from moe_jax.convert.quantized import Tensor
from moe_jax.errors import UserError
from moe_jax.models.decoder import DecoderModel
from moe_jax.models.segments import Segment
from moe_jax.tree import named_leaves

PARAMS, STATE = "params", "router_state"
# Constants that old files hold; those of the copies in modules that predict further.
_CONSTANT = re.compile(r"\.rotary_emb\.inv_freq$")
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor, or a part of one, in a leaf.

    Attributes:
      hub: its name in the files.
      weight: the row of the table.
      leaf: path of the leaf, which begins with `PARAMS` or `STATE`.
      layer: index of the block, -1 outside of them.
      repeat: place on the leaf's leading axis of layers; None: it has none.
      expert: place on the axis after that; None: all experts, or none.
      shape: of the leaf, without axes of layers and, where `expert` is set, experts.
    """

    hub: str
    weight: Weight
    leaf: str
    layer: int
    repeat: int | None
    expert: int | None
    shape: tuple[int, ...]

    @property
    def hub_shape(self) -> tuple[int, ...]:
        return self.weight.hub_shape(self.shape)


@dataclasses.dataclass(frozen=True)
class Part:
    """A block, or what stands outside.

    Attributes:
      rows: of its table.
      prefix: of the names in the files.
      path: of the leaves.
      layer: index of the block, -1 outside of them.
      repeat: place on the parameters' leading axis of layers; None: there is none.
      state_repeat: the same of the router state.
    """

    rows: tuple[Weight, ...]
    prefix: str
    path: str
    layer: int = -1
    repeat: int | None = None
    state_repeat: int | None = None


def leaves_of(params: Any, router_state: Any) -> dict[str, Any]:
    """All leaves by path; of arrays, or of shapes."""
    return named_leaves({PARAMS: params, STATE: router_state})


def places(
    family: Family, model: DecoderModel, leaves: Mapping[str, Any]
) -> list[Place]:
    """Where each tensor of the files is, in the order of the layers.

    Args:
      family: the tables.
      model: tells where its layers are.
      leaves: of `leaves_of`.

    Raises:
      UserError: the family has no tensor for a leaf.
    """
    what = f"models of the family {family.model_type}"
    return places_of(_parts(family, model), leaves, what)


def places_of(
    parts: Iterable[Part], leaves: Mapping[str, Any], what: str
) -> list[Place]:
    """The same, of parts.

    Args:
      parts: in the order of the layers.
      leaves: of `leaves_of`.
      what: is expressed by the parts, for the message.

    Raises:
      UserError: a leaf is in none of them.
    """
    found = [p for part in parts for p in _places_of(part, leaves)]
    left = leaves.keys() - {place.leaf for place in found}
    if left:
        raise UserError(
            f"{what} have nothing that corresponds to {sorted(left)[0]}"
            + (f" and {len(left) - 1} more leaves" if len(left) > 1 else "")
        )
    return found


def blocks(
    segments: Iterable[Segment], rows: tuple[Weight, ...], prefix: str
) -> Iterator[Part]:
    """The parts of a model's blocks; `{}` in `prefix` stands for the layer."""
    for i, segment in enumerate(segments):
        for repeat in range(segment.repeats):
            for j in range(len(segment.blocks)):
                layer = segment.first_layer + repeat * len(segment.blocks) + j
                yield Part(
                    rows,
                    prefix.format(layer),
                    f"segment_{i}/block_{j}/",
                    layer=layer,
                    repeat=repeat,
                    state_repeat=repeat,
                )


def _parts(family: Family, model: DecoderModel) -> Iterator[Part]:
    yield Part(family.outer, "", "")
    yield from blocks(model.segments, family.block, "model.layers.{}.")
    for k in range(model.options.mtp):
        layer = model.options.num_layers + k
        prefix = f"model.layers.{layer}."
        yield Part(family.ahead, prefix, f"mtp_{k}/", layer=layer)
        path = f"mtp_{k}/block/"
        yield Part(family.block, prefix, path, layer=layer, state_repeat=0)


def _places_of(part: Part, leaves: Mapping[str, Any]) -> Iterator[Place]:
    for weight in part.rows:
        root = STATE if weight.state else PARAMS
        leaf = f"{root}/{part.path}{weight.leaf}"
        if leaf not in leaves:
            continue
        repeat = part.state_repeat if weight.state else part.repeat
        shape = leaves[leaf].shape
        shape = shape if repeat is None else shape[1:]
        hub = part.prefix + weight.hub
        if not weight.per_expert:
            yield Place(hub, weight, leaf, part.layer, repeat, None, shape)
            continue
        for e in range(shape[0]):
            name = hub.replace("{e}", str(e))
            yield Place(name, weight, leaf, part.layer, repeat, e, shape[1:])


def check(
    wanted: list[Place],
    tensors: Mapping[str, Tensor],
    model: DecoderModel,
    ahead: int = 0,
) -> list[str]:
    """Compares what is there with what a model takes.

    Args:
      wanted: of `places`.
      tensors: of the checkpoint.
      model: that is made.
      ahead: modules that predict further tokens in the checkpoint; those that the model
        does not have are left out.

    Returns:
      Lines about tensors that are left out.

    Raises:
      UserError: a tensor is missing, left over, or of another shape; which one.
    """
    left = tensors.keys() - {p.hub for p in wanted}
    lines, extra = _left_out(left, tensors, model, ahead)
    for place in wanted:
        tensor = tensors.get(place.hub)
        if tensor is None:
            missing = {p.hub for p in wanted} - tensors.keys()
            raise UserError(_counted("is missing in the checkpoint", sorted(missing)))
        if tensor.shape != place.hub_shape:
            raise UserError(
                f"{tensor.path}: {place.hub} has the shape {list(tensor.shape)}, but "
                f"config.json asks for {list(place.hub_shape)}"
            )
        check_type(tensor)
    if extra:
        raise UserError(_counted("has no place in this model", extra))
    return lines


def check_type(tensor: Tensor) -> None:
    """Refuses what is neither a floating point tensor nor a quantised one.

    Raises:
      UserError: it is of another type.
    """
    floats = tensor.type_name[0] in "FB" and tensor.type_name != "BOOL"
    if not floats and not tensor.quantized:
        raise UserError(
            f"{tensor.path}: {tensor.name} is of type {tensor.type_name}, which is no "
            "floating point type"
        )


def _counted(what: str, names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]} {what}{more}"


def _left_out(
    names: set[str], tensors: Mapping[str, Tensor], model: DecoderModel, ahead: int
) -> tuple[list[str], list[str]]:
    """Lines about tensors that may be left out, and the names of all others."""
    options, lines = model.options, []
    constants = {name for name in names if _CONSTANT.search(name)}
    if constants:
        lines.append(f"left out: {len(constants)} tables of rotary frequencies")
    depth = lambda name: _layer(name) - options.num_layers
    further = {name for name in names if options.mtp <= depth(name) < ahead}
    if further:
        layers = sorted({_layer(name) for name in further})
        lines.append(
            f"left out: {len(further)} tensors of layers {layers}, which predict "
            "further tokens; a --config with model.mtp takes them"
        )
    copies = {
        name
        for name in names
        if 0 <= depth(name) < options.mtp and name.endswith(_COPIES)
    }
    if copies:
        lines.append(f"left out: copies of embedding and output: {sorted(copies)}")
    tied = {"lm_head.weight"} & names if options.tie_embeddings else set()
    if tied:
        _check_tied(tensors)
        lines.append("left out: lm_head.weight, the embedding once more")
    return lines, sorted(names - constants - further - copies - tied)


def _layer(name: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _check_tied(tensors: Mapping[str, Tensor]) -> None:
    embedding = tensors.get("model.embed_tokens.weight")
    output = tensors["lm_head.weight"]
    if embedding is None or output.shape != embedding.shape:
        same = False
    else:
        pairs = zip(output.array(), embedding.array(), strict=True)
        same = all((a == b).all() for a, b in pairs)
    if not same:
        raise UserError(
            f"{output.path}: lm_head.weight differs from model.embed_tokens.weight, "
            "but config.json says tie_word_embeddings"
        )
