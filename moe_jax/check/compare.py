"""What one training step says, and how far two such records are apart."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moe_jax.moe.routing import Routing
from moe_jax.train.step import Gradients
from moe_jax.tree import named_leaves

TOLERANCE = {"float64": 1e-8, "float32": 1e-5}
# A gradient of at most this part of the whole one, times the tolerance, is rounding.
ROUNDING = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One step on one mesh, as arrays of the host.

    Attributes:
      close: name -> array, to be equal within the tolerance.
      exact: name -> integers, to be equal.
      allowed: name -> the tolerance of what is not held to `TOLERANCE`.
      dropped: assignments that no expert served.
      near_ties: tokens whose last chosen and first rejected expert are closer than
        the tolerance, per MoE layer.
    """

    close: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]
    allowed: dict[str, float]
    dropped: int
    near_ties: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a quantity of one mesh is from that of one device.

    Attributes:
      name: of the quantity, such as `grad/segment_0/block_0/moe/experts/w_up`.
      error: norm of the difference over the norm of the reference; for integers the
        number of entries that differ.
      allowed: the largest error that passes.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        # A NaN must not pass.
        return bool(self.error <= self.allowed)


def _near_ties(routing: Routing, tolerance: float) -> list[int]:
    choice = np.asarray(routing.choice_te, np.float64)
    served = np.zeros(choice.shape, np.int64)
    for k in range(routing.expert_tk.shape[-1]):
        expert = np.asarray(routing.expert_tk)[..., k, None]
        hit = np.arange(choice.shape[-1]) == expert
        served += hit & np.asarray(routing.valid_tk)[..., k, None]
    last = np.min(np.where(served, choice, np.inf), axis=-1)
    first = np.max(np.where(served, -np.inf, choice), axis=-1)
    both = np.isfinite(last) & np.isfinite(first)
    last, first = np.where(both, last, 0), np.where(both, first, 0)
    near = both & (np.abs(last - first) <= tolerance * np.maximum(np.abs(last), 1e-30))
    return np.sum(near & np.asarray(routing.valid_t), axis=-1).tolist()


def record(
    found: Gradients,
    norm: jax.Array,
    params: Any,
    nudged: Any,
    router_state: Any,
    dtype: str,
) -> Record:
    """Brings a step's results to the host.

    Args:
      found: with captured routing where the model has MoE layers.
      norm: of the gradient.
      params: after the step.
      nudged: the same, of gradients that are apart by the tolerance. An optimizer may
        make more of that: Adam divides an entry by its size, and so a vector that
        begins at zero moves by as much where its gradient is hardly there. As far as
        these are apart, parameters may be.
      router_state: after the step.
      dtype: of the computation.
    """
    found, norm, params, nudged, router_state = jax.device_get(
        (found, norm, params, nudged, router_state)
    )
    close = {"loss": found.loss, "reported": found.reported, "grad_norm": norm}
    exact = {"scored tokens": np.asarray(found.weight, np.int64)}
    dropped, near_ties = 0, []
    if found.aux is not None:
        close |= {f"balance/{n}": v for n, v in found.aux.losses.items()}
        close["router entropy"] = found.aux.health["entropy"]
        exact["expert counts"] = found.aux.health["counts"]
        exact["assignments"] = found.aux.stats.assignments
        dropped = int(np.sum(found.aux.stats.dropped))
        if isinstance(found.aux.routing, Routing):
            near_ties = _near_ties(found.aux.routing, TOLERANCE[dtype])
    close |= {f"grad/{n}": v for n, v in named_leaves(found.grads).items()}
    close |= {f"router state/{n}": v for n, v in named_leaves(router_state).items()}
    after = {f"parameters after/{n}": v for n, v in named_leaves(params).items()}
    apart = zip(after.items(), named_leaves(nudged).values(), strict=True)
    close |= after
    return Record(
        close={n: np.asarray(v, np.float64) for n, v in close.items()},
        exact=exact,
        allowed={
            name: max(TOLERANCE[dtype], relative_error(np.float64(b), np.float64(a)))
            for (name, a), b in apart
        },
        dropped=dropped,
        near_ties=near_ties,
    )


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference; inf for other shapes."""
    if value.shape != reference.shape:
        return float("inf")
    gap = float(np.linalg.norm((value - reference).ravel()))
    size = float(np.linalg.norm(reference.ravel()))
    return gap if size == 0 else gap / size


def _of_rounding(a, b, reference: Record, dtype: str) -> float:
    """The error of a gradient that is nothing but rounding; inf of any other.

    A bias on all keys changes no attention: its gradient is zero, and what is there
    instead has no digits. It is measured against the whole gradient.
    """
    whole = float(reference.close["grad_norm"])
    both = max(float(np.linalg.norm(x.ravel())) for x in (a, b))
    return both / whole if both <= ROUNDING * TOLERANCE[dtype] * whole else float("inf")


def differences(found: Record, reference: Record, dtype: str) -> Iterator[Difference]:
    """One difference a quantity, in the reference's order.

    A quantity that only one of them has differs infinitely.
    """
    for name in [
        *reference.exact,
        *(n for n in found.exact if n not in reference.exact),
    ]:
        a, b = found.exact.get(name), reference.exact.get(name)
        missing = a is None or b is None or np.shape(a) != np.shape(b)
        error = float("inf") if missing else float(np.sum(np.asarray(a) != b))
        yield Difference(name=name, error=error, allowed=0.0)
    for name in [
        *reference.close,
        *(n for n in found.close if n not in reference.close),
    ]:
        a, b = found.close.get(name), reference.close.get(name)
        error = float("inf") if a is None or b is None else relative_error(a, b)
        if name.startswith("grad/") and error > 0 and np.isfinite(error):
            error = min(error, _of_rounding(a, b, reference, dtype))
        allowed = reference.allowed.get(name, TOLERANCE[dtype])
        yield Difference(name=name, error=error, allowed=allowed)
