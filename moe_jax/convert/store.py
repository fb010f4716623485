"""From arrays on a mesh to files, one leaf of one layer at a time."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.convert import folder, tensor_file
from moe_jax.convert.mapping import Place
from moe_jax.convert.tensor_file import Planned

Tensors = dict[str, list[Place]]


def by_tensor(places: Sequence[Place]) -> Tensors:
    """The places of each tensor of the files; several leaves may share one."""
    found: Tensors = {}
    for place in places:
        found.setdefault(place.hub, []).append(place)
    return found


def planned(tensors: Tensors, types: Mapping[str, str]) -> list[Planned]:
    """What is written: each tensor with its shape, and its type by name."""
    return [Planned(n, types[n], p[0].hub_shape) for n, p in tensors.items()]


def files(tensors: Sequence[Planned], most_bytes: int) -> dict[str, list[Planned]]:
    """Tensors by file, in order, each file below a size where its tensors allow."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {folder.SINGLE: shards[0]}
    name = lambda i: f"model-{i:05}-of-{len(shards):05}.safetensors"
    return {name(i): shard for i, shard in enumerate(shards, 1)}


def write(
    target: str,
    tensors: Tensors,
    shards: Mapping[str, list[Planned]],
    leaves: Mapping[str, Any],
) -> None:
    """Writes all files, and the index where they are several.

    Args:
      target: the folder, which exists.
      tensors: of `by_tensor`, in the order of the files.
      shards: of `files`.
      leaves: arrays by path.

    Raises:
      OSError: a file cannot be written.
    """
    all_planned = list(itertools.chain.from_iterable(shards.values()))
    values = _values(tensors, all_planned, leaves)
    for name, shard in shards.items():
        tensor_file.write(os.path.join(target, name), shard, values)
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in all_planned)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }
    with open(os.path.join(target, folder.INDEX), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)


def _values(tensors, all_planned, leaves) -> Iterator[np.ndarray]:
    groups = ((tensor, tensors[tensor.name]) for tensor in all_planned)
    of_layer = lambda entry: (entry[1][0].layer, entry[1][0].repeat)
    for (_, repeat), entries in itertools.groupby(groups, of_layer):
        entries = list(entries)
        names = {place.leaf for _, group in entries for place in group}
        layer = {name: leaves[name] for name in names}
        if repeat is not None:
            layer = _slices(layer, repeat)
        fetched = _Fetched(layer)
        for tensor, group in entries:
            value = np.empty(tensor.shape, tensor_file.TYPES[tensor.type_name])
            for place in group:
                leaf = fetched[place.leaf]
                leaf = leaf if place.expert is None else leaf[place.expert]
                place.weight.put_into(value, leaf)
            yield value


@jax.jit
def _slices(stacks, repeat):
    """One layer of stacked leaves; the place is traced, so that it compiles once."""
    take = jax.lax.dynamic_index_in_dim
    return {name: take(stack, repeat, keepdims=False) for name, stack in stacks.items()}


class _Fetched(dict):
    """Leaves on the host, each when it is asked for."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = leaves

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = np.asarray(jax.device_get(self._leaves[name]))
        return self[name]
