"""What a block keeps for its backward pass, and where, by the words of a config."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from moe_jax import config
from moe_jax.moe.dispatch.common import EXCHANGED
from moe_jax.nn.attention.common import ATTENDED, PROJECTED
from moe_jax.nn.feedforward import HIDDEN
from moe_jax.parallel import host
from moe_jax.parallel.collectives import GATHERED

# Name of what comes into a block, for rematerialisation.
INPUT = "block_input"
# What a rematerialised block may keep for its backward pass, by the name in a config.
NAMES = {
    "attention": ATTENDED,
    "projections": PROJECTED,
    "exchanges": EXCHANGED,
    "hidden": HIDDEN,
    "weights": GATHERED,
}
_ON_HOST = "host:"
# The same in the memory of the host, and what a block keeps in any case.
HOST_NAMES = {
    _ON_HOST + name: value for name, value in {**NAMES, "input": INPUT}.items()
}
_PLAIN_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def names_of(remat: str) -> frozenset[str]:
    """What is kept by name: {"attention", "host:hidden"} of "attention,host:hidden"."""
    named = (one for one in remat.split(",") if one not in _PLAIN_POLICIES)
    return frozenset(name for one in named for name in one.split("+"))


def policies(remat: str) -> tuple[Callable[..., Any] | None, ...]:
    """The policies of `jax.checkpoint`; None: there is nothing to recompute."""
    return tuple(map(_policy, remat.split(",")))


def _policy(remat):
    if remat in _PLAIN_POLICIES:
        return _PLAIN_POLICIES[remat]
    names = names_of(remat)
    kept = sorted(NAMES[name] for name in names if not name.startswith(_ON_HOST))
    away = sorted(HOST_NAMES[name] for name in names if name.startswith(_ON_HOST))
    if not away:
        return jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=away,
        offload_src="device",
        offload_dst=host.KIND,
    )


def uses_host(remat: str) -> bool:
    """Whether anything waits in the memory of the host."""
    return any(name in HOST_NAMES for name in names_of(remat))


def problems(options: Any, path: str, root: config.Config) -> Iterator[str]:
    """Of a model's `remat`, but for how many policies there are."""
    names = names_of(options.remat)
    given = f"{path}.remat={options.remat!r}"
    if unknown := names - set(NAMES) - set(HOST_NAMES):
        yield (
            f"{given}: {sorted(unknown)[0]!r} is not known; it takes one of "
            f"{list(_PLAIN_POLICIES)}, or some of {[*NAMES, 'host:input']} joined by "
            "'+' (each may wait on the host: 'host:attention'), or several of these "
            "with commas"
        )
    if both := sorted(n for n in names if _ON_HOST + n in names):
        yield f"{given} keeps {both[0]!r} on the device and on the host; take one"
    if names & {"weights", "host:weights"} and root.train.gather_once:
        yield (
            f"{given}: with config.train.gather_once the gathered weights are there in "
            "any case; leave 'weights' out, or set 'full'"
        )
