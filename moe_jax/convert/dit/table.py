"""Names of DiT's and DiT-MoE's tensors; the notation is that of `convert.hf.table`.

Large DiT-MoE models norm queries and keys, and name their attention otherwise.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.convert import mapping
from moe_jax.convert.hf.table import Weight, gated
from moe_jax.convert.mapping import Part
from moe_jax.models.dit_config import DiT
from moe_jax.models.segments import Segment
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear

POSITIONS = "pos_embed"


def _affine(hub: str, leaf: str, weight: str, bias: str, **fields) -> tuple:
    """A matrix and its bias."""
    return (
        Weight(f"{hub}.weight", f"{leaf}/w", weight, **fields),
        Weight(f"{hub}.bias", f"{leaf}/b", bias),
    )


def _outer(options: DiT) -> tuple[Weight, ...]:
    side, channels = options.patch_size, options.in_channels
    sizes = (("r", side), ("s", side), ("c", channels))
    return (
        Weight(POSITIONS, POSITIONS, "xnd->xnd"),
        *_affine("x_embedder.proj", "patches", "dcrs->(rsc)d", "d->d", sizes=sizes),
        *_affine("t_embedder.mlp.0", "time/first", "dw->wd", "d->d"),
        *_affine("t_embedder.mlp.2", "time/second", "od->do", "o->o"),
        Weight("y_embedder.embedding_table.weight", "label/table", "vd->vd"),
        *_affine("final_layer.linear", "output", "od->do", "o->o"),
        *_modulation("final_layer."),
    )


def _modulation(prefix: str) -> tuple[Weight, ...]:
    hub = f"{prefix}adaLN_modulation.1"
    return _affine(hub, "modulation/linear", "(nm)d->dnm", "(nm)->nm")


def _attention(joined: str, out: str) -> tuple[Weight, ...]:
    """Queries, keys and values lie one after the other in one matrix."""
    parts = [dict(part=i, parts=3, first=True) for i in range(3)]
    return (
        *(
            Weight(f"attn.{joined}.weight", f"attention/w_{n}", "(hk)d->dhk", **part)
            for n, part in zip("qkv", parts, strict=True)
        ),
        *(
            Weight(f"attn.{joined}.bias", f"attention/b_{n}", "(hk)->hk", **part)
            for n, part in zip("qkv", parts, strict=True)
        ),
        Weight(f"attn.{out}.weight", "attention/w_o", "d(hk)->hkd"),
        Weight(f"attn.{out}.bias", "attention/b_o", "d->d"),
    )


_NORMS = tuple(
    Weight(f"attn.{n}_norm.{theirs}", f"attention/{n}_norm/{ours}", "k->k")
    for n in "qk"
    for theirs, ours in (("weight", "scale"), ("bias", "bias"))
)
ATTENTION = {
    "none": _attention("qkv", "proj"),
    "layer": (*_attention("Wqkv", "out_proj"), *_NORMS),
}
_FEED_FORWARD = (
    Weight("mlp.fc1.weight", "feed_forward/w_up", "fd->df"),
    Weight("mlp.fc1.bias", "feed_forward/b_up", "f->f"),
    Weight("mlp.fc2.weight", "feed_forward/w_down", "df->fd"),
    Weight("mlp.fc2.bias", "feed_forward/b_down", "d->d"),
    Weight("moe.gate.weight", "moe/scorer/w", "ed->de"),
    Weight("moe.experts.{e}.gate_proj.weight", "moe/experts/w_gate", "fd->edf"),
    Weight("moe.experts.{e}.up_proj.weight", "moe/experts/w_up", "fd->edf"),
    Weight("moe.experts.{e}.down_proj.weight", "moe/experts/w_down", "df->efd"),
    *gated("moe.shared_experts", "moe/shared"),
)


def parts(options: DiT, segments: tuple[Segment, ...]) -> Iterator[Part]:
    """All rows of a model, in the order of the files."""
    yield Part(_outer(options), "", "")
    block = (*ATTENTION[options.qk_norm], *_FEED_FORWARD, *_modulation(""))
    yield from mapping.blocks(segments, block, "blocks.{}.")


def lost(model: Any) -> list[str]:
    """What such a checkpoint cannot say of a model; empty: nothing is lost.

    Weights that have no name in it are found elsewhere, by `mapping.places_of`.
    """
    if not isinstance(model, DiT):
        return [f"config.model is a {type(model).__name__}, no DiT"]
    ff, found = model.feed_forward, []
    if model.qk_norm not in ATTENTION:
        found.append(f"qk_norm={model.qk_norm!r}: must be one of {list(ATTENTION)}")
    if not isinstance(ff, MoE):
        return found + _units(ff, "feed_forward", _MLP)
    if type(ff.scorer) is not Linear:
        found.append(f"feed_forward.scorer={type(ff.scorer).__name__}: must be Linear")
    return found + _units(ff.experts, "feed_forward.experts", _EXPERT)


_PLAIN = dict(clamp=0.0, up_offset=0.0)
_MLP = dict(activation="gelu", gated=False, bias=True, **_PLAIN)
_EXPERT = dict(activation="silu", gated=True, bias=False, **_PLAIN)


def _units(options: Any, where: str, wanted: dict[str, Any]) -> list[str]:
    return [
        f"{where}.{name}={getattr(options, name)!r}: must be {value!r}"
        for name, value in wanted.items()
        if getattr(options, name) != value
    ]
