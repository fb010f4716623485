"""Sums over the instructions of a computation."""

import dataclasses

_SUMS = (
    "flops",
    "kernel_flops",
    "hbm_bytes",
    "matmul_seconds",
    "memory_seconds",
    "link_seconds",
    "mxu_seconds",
    "seconds",
)


@dataclasses.dataclass
class Traffic:
    """All executions of one kind of collective over one set of axes, or of copies."""

    count: float = 0.0
    payload: float = 0.0
    wire: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0

    def add(self, other: "Traffic", times: float = 1.0) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclasses.dataclass
class Totals:
    """What a computation does, sums over its instructions.

    Attributes:
      flops: of matrix products and kernels.
      kernel_flops: of kernels alone.
      hbm_bytes: read and written.
      mxu_seconds: FLOPs over the peak rate.
      matmul_seconds: time of what the matrix unit bounds.
      memory_seconds: time of what HBM bounds.
      link_seconds: of all collectives, hidden or not.
      seconds: the walk's clock.
      traffic: by (kind, axes).
      host: copies by direction.
      scopes: seconds by scope of the model.
      dynamic: loops whose passes depend on data: name -> (times met, one pass).
      unknown: kernels without a work model.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    mxu_seconds: float = 0.0
    matmul_seconds: float = 0.0
    memory_seconds: float = 0.0
    link_seconds: float = 0.0
    seconds: float = 0.0
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = dataclasses.field(
        default_factory=dict
    )
    host: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    scopes: dict[str, float] = dataclasses.field(default_factory=dict)
    dynamic: dict[str, tuple[float, "Totals"]] = dataclasses.field(default_factory=dict)
    unknown: set[str] = dataclasses.field(default_factory=set)

    @property
    def exposed_seconds(self) -> float:
        return sum(t.exposed for t in self.traffic.values())

    def add(self, other: "Totals", times: float = 1.0) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, traffic in other.traffic.items():
            self.traffic.setdefault(key, Traffic()).add(traffic, times)
        for key, traffic in other.host.items():
            self.host.setdefault(key, Traffic()).add(traffic, times)
        for scope, seconds in other.scopes.items():
            self.scopes[scope] = self.scopes.get(scope, 0.0) + times * seconds
        for name, (met, once) in other.dynamic.items():
            before = self.dynamic.get(name, (0.0, once))[0]
            self.dynamic[name] = (before + times * met, once)
        self.unknown |= other.unknown
