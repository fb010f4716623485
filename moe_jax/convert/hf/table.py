"""How a table of weights is written, and the rows that families share.

A row names a tensor as it is in the files (behind `model.layers.N.`), the leaf that it
is in (behind `segment_i/block_j/`), and how their dimensions correspond, as in
`"(hk)d->dhk"`: the tensor is (H * Dh, D), the leaf (D, H, Dh). A letter is a dimension
of the leaf, whose sizes are known; brackets join several to one of the tensor, or of
the leaf, and then `sizes` has theirs. The dimension e, of experts, is missing on the
left where each expert has a tensor, `{e}` in its name.

A table lists all that a family may have. What the model at hand has no leaf for is left
out.
"""

import dataclasses
import functools
import math
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Weight:
    """A row.

    Attributes:
      hub: name of the tensor; with `{e}` one an expert.
      leaf: path of the leaf.
      dims: `tensor->leaf`.
      part: of a tensor whose last dimension holds several leaves in turn, which one.
      parts: how many; 1: it holds this leaf alone.
      first: they are one after the other in the first dimension instead.
      sizes: of letters in brackets on the right.
      state: whether the leaf is of the router state, not of the parameters.
    """

    hub: str
    leaf: str
    dims: str
    part: int = 0
    parts: int = 1
    first: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    state: bool = False

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.hub

    @functools.cached_property
    def _letters(self) -> tuple[list[str], list[str]]:
        """Groups of letters of the tensor, and those of the leaf."""
        left, right = self.dims.split("->")
        of_leaf = right.replace("e", "") if self.per_expert else right
        groups = _groups(left), _groups(of_leaf)
        letters = ["".join(group) for group in groups]
        once = len(set(letters[0])) == len(letters[0])
        if sorted(letters[0]) != sorted(letters[1]) or not once:
            raise ValueError(f"{self.dims!r} of {self.hub}: letters differ")
        return groups

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        sizes = dict(zip(self._letters[1], shape, strict=True)) | dict(self.sizes)
        if wrong := [g for g, n in sizes.items() if n != _joined(sizes, g)]:
            raise ValueError(f"{self.hub}: {self.dims!r} with {sizes}: {wrong}")
        return sizes

    def _of(self, tensor: np.ndarray) -> np.ndarray:
        """What this leaf has of the tensor, a view."""
        if not self.first:
            return tensor[..., self.part :: self.parts]
        size = len(tensor) // self.parts
        return tensor[self.part * size :][:size]

    def hub_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor for a leaf of this shape, without layers or `{e}`."""
        sizes = self._sizes(shape)
        found = [_joined(sizes, group) for group in self._letters[0]]
        found[0 if self.first else -1] *= self.parts
        return tuple(found)

    def to_leaf(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The leaf that a tensor holds: a view, so that nothing is read yet.

        With brackets on the right it is a copy.
        """
        letters, of_leaf = ("".join(groups) for groups in self._letters)
        sizes = self._sizes(shape)
        split = self._of(tensor).reshape([sizes[c] for c in letters])
        return split.transpose([letters.index(c) for c in of_leaf]).reshape(shape)

    def put_into(self, tensor: np.ndarray, leaf: np.ndarray) -> None:
        """Writes a leaf into the tensor that holds it, and maybe others."""
        letters, of_leaf = ("".join(groups) for groups in self._letters)
        sizes = self._sizes(leaf.shape)
        split = leaf.reshape([sizes[c] for c in of_leaf])
        target = self._of(tensor)
        split = split.transpose([of_leaf.index(c) for c in letters])
        target[...] = split.reshape(target.shape)


def _groups(letters: str) -> list[str]:
    return [a or b for a, b in re.findall(r"\((\w+)\)|(\w)", letters)]


def _joined(sizes: dict[str, int], group: str) -> int:
    return math.prod(sizes[c] for c in group)


OUTER = (
    Weight("model.embed_tokens.weight", "embedding", "vd->vd"),
    Weight("model.norm.weight", "norm/scale", "d->d"),
    Weight("model.norm.bias", "norm/bias", "d->d"),
    Weight("lm_head.weight", "output", "vd->dv"),
    Weight("lm_head.bias", "output_bias", "v->v"),
)
NORMS = (
    Weight("input_layernorm.weight", "attention_norm/scale", "d->d"),
    Weight("input_layernorm.bias", "attention_norm/bias", "d->d"),
    Weight("post_attention_layernorm.weight", "feed_forward_norm/scale", "d->d"),
    Weight("post_attention_layernorm.bias", "feed_forward_norm/bias", "d->d"),
)
ATTENTION = (
    Weight("self_attn.q_proj.weight", "attention/w_q", "(hk)d->dhk"),
    Weight("self_attn.k_proj.weight", "attention/w_k", "(hk)d->dhk"),
    Weight("self_attn.v_proj.weight", "attention/w_v", "(hk)d->dhk"),
    Weight("self_attn.o_proj.weight", "attention/w_o", "d(hk)->hkd"),
    Weight("self_attn.q_proj.bias", "attention/b_q", "(hk)->hk"),
    Weight("self_attn.k_proj.bias", "attention/b_k", "(hk)->hk"),
    Weight("self_attn.v_proj.bias", "attention/b_v", "(hk)->hk"),
    Weight("self_attn.o_proj.bias", "attention/b_o", "d->d"),
)
# A norm of each head, and of all heads together.
HEAD_NORMS = (
    Weight("self_attn.q_norm.weight", "attention/q_norm/scale", "k->k"),
    Weight("self_attn.k_norm.weight", "attention/k_norm/scale", "k->k"),
)
PROJECTION_NORMS = (
    Weight("self_attn.q_norm.weight", "attention/q_norm/scale", "(hk)->hk"),
    Weight("self_attn.k_norm.weight", "attention/k_norm/scale", "(hk)->hk"),
)
LATENT_ATTENTION = (
    Weight("self_attn.q_proj.weight", "attention/w_q", "(hk)d->dhk"),
    Weight("self_attn.q_a_proj.weight", "attention/w_q_down", "rd->dr"),
    Weight("self_attn.q_a_layernorm.weight", "attention/q_norm/scale", "r->r"),
    Weight("self_attn.q_b_proj.weight", "attention/w_q_up", "(hk)r->rhk"),
    Weight("self_attn.kv_a_proj_with_mqa.weight", "attention/w_kv_down", "rd->dr"),
    Weight("self_attn.kv_a_layernorm.weight", "attention/kv_norm/scale", "r->r"),
    Weight("self_attn.kv_b_proj.weight", "attention/w_kv_up", "(hk)r->rhk"),
    Weight("self_attn.o_proj.weight", "attention/w_o", "d(hk)->hkd"),
)


def gated(hub: str, leaf: str) -> tuple[Weight, ...]:
    """A feed-forward with names as Llama's: `gate_proj`, `up_proj`, `down_proj`."""
    return tuple(
        Weight(f"{hub}.{name}_proj.{kind}", f"{leaf}/{letter}_{name}", dims)
        for kind, letter, into, out in (
            ("weight", "w", "fd->df", "df->fd"),
            ("bias", "b", "f->f", "d->d"),
        )
        for name, dims in (("gate", into), ("up", into), ("down", out))
    )


DENSE = gated("mlp", "feed_forward")
ROUTER = (Weight("mlp.gate.weight", "moe/scorer/w", "ed->de"),)
EXPERTS = (
    Weight("mlp.experts.{e}.gate_proj.weight", "moe/experts/w_gate", "fd->edf"),
    Weight("mlp.experts.{e}.up_proj.weight", "moe/experts/w_up", "fd->edf"),
    Weight("mlp.experts.{e}.down_proj.weight", "moe/experts/w_down", "df->efd"),
)
# As Mixtral's files have them.
MIXTRAL_EXPERTS = (
    Weight("block_sparse_moe.gate.weight", "moe/scorer/w", "ed->de"),
    Weight("block_sparse_moe.experts.{e}.w1.weight", "moe/experts/w_gate", "fd->edf"),
    Weight("block_sparse_moe.experts.{e}.w3.weight", "moe/experts/w_up", "fd->edf"),
    Weight("block_sparse_moe.experts.{e}.w2.weight", "moe/experts/w_down", "df->efd"),
)
