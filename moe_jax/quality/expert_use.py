"""What experts are used for: by noise time, by class and by position in the image.

Counts are of assignments, (L, E, G): layers, experts, and the groups of one attribute.
The mutual information of expert and group is 0 bits where they are independent, and at
most log2 of the smaller number of either.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Information:
    """What the expert of an assignment tells of its group, by layer.

    Attributes:
      bits: (L,), as the counts have it; too high where they are few.
      bias: (L,), by how much that is too high on average if assignments are independent
        (Miller 1955; Madow).
      floor: (L,), what remains if groups are shuffled among the images, or None. All
        tokens of an image are of one class and time: that makes chance worth more than
        `bias` says, and this counts it.
    """

    bits: np.ndarray
    bias: np.ndarray
    floor: np.ndarray | None = None

    @property
    def above(self) -> np.ndarray:
        """(L,), bits above what chance gives, at least 0."""
        chance = self.bias if self.floor is None else self.floor
        return np.maximum(self.bits - chance, 0)


def count(
    expert_tk: Array, valid_tk: Array, group_t: Array, num_experts: int, num_groups: int
) -> Array:
    """Assignments of one layer by expert and group, int32 (E, G); for use inside jit.

    Args:
      expert_tk: (T, K).
      valid_tk: bool (T, K).
      group_t: int32 (T,); a token outside of [0, num_groups) does not count.
      num_experts: E.
      num_groups: G.
    """
    group_tk = jnp.broadcast_to(group_t[:, None], expert_tk.shape)
    inside = (group_tk >= 0) & (group_tk < num_groups)
    cells = jnp.zeros((num_experts, num_groups), jnp.int32)
    return cells.at[expert_tk, group_tk].add(
        (valid_tk & inside).astype(jnp.int32), mode="drop"
    )


def by_group(counts_nle: np.ndarray, group_n: np.ndarray, num_groups: int):
    """Counts of images (N, L, E) added up by the images' groups: int64 (L, E, G)."""
    counts_nle = np.asarray(counts_nle, np.int64)
    made = np.zeros((num_groups, *counts_nle.shape[1:]), np.int64)
    np.add.at(made, np.asarray(group_n), counts_nle)
    return np.moveaxis(made, 0, -1)


def mutual_information(counts_leg: np.ndarray) -> np.ndarray:
    """I(expert; group) in bits, (...,), of counts (..., E, G); 0 without any."""
    joint = np.asarray(counts_leg, np.float64)
    joint = joint / np.maximum(joint.sum((-2, -1), keepdims=True), 1)
    apart = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)
    return np.maximum((joint * np.log2(ratio)).sum((-2, -1)), 0)


def bias(counts_leg: np.ndarray) -> np.ndarray:
    """How much too high that is on average, in bits, if assignments are independent.

    `(cells - experts - groups + 1) / (2 N ln 2)`, counting those that occur: the
    correction of Miller and Madow, of each of the three entropies.
    """
    there = np.asarray(counts_leg) > 0
    cells = there.sum((-2, -1))
    experts, groups = there.any(-1).sum(-1), there.any(-2).sum(-1)
    total = np.maximum(np.asarray(counts_leg).sum((-2, -1)), 1)
    return np.maximum(cells - experts - groups + 1, 0) / (2 * total * np.log(2))


def of_counts(counts_leg: np.ndarray) -> Information:
    """The information of counts whose groups no image shares, such as positions."""
    return Information(mutual_information(counts_leg), bias(counts_leg))


def of_images(
    counts_nle: np.ndarray,
    group_n: np.ndarray,
    num_groups: int,
    seed: int = 0,
    shuffles: int = 20,
) -> Information:
    """The information of groups of whole images: their time, or their class.

    Args:
      counts_nle: assignments of each image, layer and expert.
      group_n: (N,) in [0, num_groups).
      num_groups: G.
      seed: of the shuffles.
      shuffles: whose mean is the floor.
    """
    rng, group_n = np.random.default_rng(seed), np.asarray(group_n)
    counts_leg = by_group(counts_nle, group_n, num_groups)
    floor = [
        mutual_information(by_group(counts_nle, rng.permutation(group_n), num_groups))
        for _ in range(shuffles)
    ]
    return Information(
        mutual_information(counts_leg), bias(counts_leg), np.mean(floor, axis=0)
    )


def share(counts_leg: np.ndarray) -> np.ndarray:
    """What experts serve of each group, over an equal share; NaN for empty groups.

    (..., E, G) -> float64 (..., E, G), 1.00 is an equal share.
    """
    counts = np.asarray(counts_leg, np.float64)
    total = counts.sum(-2, keepdims=True)
    part = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    return part * counts.shape[-2]


def table(informations: Mapping[str, Information]) -> str:
    """Lines for the terminal: for every layer, bits by attribute, and of these chance.

    Args:
      informations: by name of the attribute, such as "time".
    """
    names = list(informations)
    lines = [
        "What experts are chosen by: mutual information in bits (of which chance)",
        "layer  " + "  ".join(f"{name:>16}" for name in names),
    ]
    for layer in range(len(informations[names[0]].bits) if names else 0):
        cells = []
        for found in informations.values():
            chance = found.bias if found.floor is None else found.floor
            cells.append(f"{found.bits[layer]:7.4f} ({chance[layer]:.4f})")
        lines.append(f"{layer:>5}  " + "  ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
