"""Bases of the config classes: a choice of method derives from one of these.

They know neither the tree (`config.py`, which offers them too) nor any method.
"""

import dataclasses
from collections.abc import Iterator

node = dataclasses.dataclass(slots=True, kw_only=True)


class Node:
    """Base of every config class."""

    __slots__ = ()

    def problems(self, path: str, root: "Node") -> Iterator[str]:
        """Yields one message a problem: path and value, the rule, the mend.

        Args:
          path: of this node.
          root: the whole tree, a `config.Config`.
        """
        return iter(())


class ModelConfig(Node):
    """Base of the model families (`models/`).

    Attributes:
      data_kind: the `kind` of `config.data` that it takes.
    """

    __slots__ = ()
    data_kind = "text"

    def positions(self, data: "BaseDataConfig") -> int:
        """Positions that a row of `data` has in the model, S; text has its own."""
        raise NotImplementedError(f"{type(self).__name__} takes {data.kind}")

    def row_shapes(
        self, data: "BaseDataConfig"
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each array of a batch, of one row."""
        raise NotImplementedError

    def rows_together(self) -> int:
        """Rows of a batch that must stay on one shard: 1 unless they are mixed."""
        return 1

    def uses_host(self) -> bool:
        """Whether activations wait in the memory of the host, by its `remat`."""
        return False


class AttentionConfig(Node):
    """Base of the attentions (`nn/attention/`)."""

    __slots__ = ()


class RopeScalingConfig(Node):
    """Base of the scalings of rotary positions (`nn/rope.py`)."""

    __slots__ = ()


class FeedForwardConfig(Node):
    """Base of a block's feed-forward: dense or MoE."""

    __slots__ = ()


class ScorerConfig(Node):
    """Base of the scorers (`moe/scorers/`).

    Attributes:
      by_time: whether it scores the time of a noisy image and nothing else.
    """

    __slots__ = ()
    by_time = False


class SelectorConfig(Node):
    """Base of the selectors (`moe/selectors/`)."""

    __slots__ = ()

    def experts_per_token(self, num_experts: int, sequence_length: int = 0) -> float:
        """Experts whose work a token costs on average; for counts of FLOPs.

        Without a sequence length: experts whose parameters may serve one token.
        """
        return float(getattr(self, "top_k", num_experts))

    def rows_together(self) -> int:
        """Rows of a batch that must stay on one shard: 1 unless they are mixed."""
        return 1

    def num_routed(self, num_experts: int) -> int:
        """Experts that compete by scores: the first so many; scores and balance."""
        return num_experts

    def size_problems(self, path: str, num_experts: int) -> Iterator[str]:
        """Rules that need E; `path` is that of the selector."""
        for name in ("top_k", "k_max"):
            value = getattr(self, name, 1)
            if value > num_experts:
                yield (
                    f"{path}.{name}={value} is more than "
                    f"{path.rpartition('.')[0]}.num_experts={num_experts}"
                )


class NoiseConfig(Node):
    """Base of the routers' noise in training (`moe/noises/`)."""

    __slots__ = ()


class DispatchConfig(Node):
    """Base of the dispatches (`moe/dispatch/`)."""

    __slots__ = ()


class ExpertsConfig(Node):
    """Base of the expert kinds (`moe/experts/`)."""

    __slots__ = ()


class InputMaskConfig(Node):
    """Base of the masks on the input of a denoiser's blocks (`models/masks/`)."""

    __slots__ = ()

    def size_problems(self, path: str, d_model: int) -> Iterator[str]:
        """Rules that need D; `path` is that of the mask."""
        return iter(())

    def share(self, name: str) -> float:
        """Share of its weight `name` that serves an image."""
        return 1.0


class ObjectiveConfig(Node):
    """Base of the objectives (`objectives/`).

    Attributes:
      autoregressive: whether a prediction must not depend on later positions.
      data_kind: the `kind` of `config.data` that it takes.
      uses_average: whether it looks at the averaged parameters.
    """

    __slots__ = ()
    autoregressive = False
    data_kind = "text"
    uses_average = False


@node
class BaseEvalConfig(Node):
    """What all held-out evaluations have.

    Attributes:
      kind: of the data.
      every: steps between evaluations; 0 evaluates only at the end.
      max_batches: batches per evaluation while training; 0 takes all. The one at the
        end always takes all.
      watchdog_secs: an evaluation, or the one at the end with its samples, that takes
        longer ends the process with a message; 0 turns it off.
    """

    kind = ""
    every: int = 0
    max_batches: int = 0
    watchdog_secs: float = 7200.0

    def problems(self, path, root):
        for name in ("every", "max_batches", "watchdog_secs"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"


@node
class BaseDataConfig(Node):
    """What all kinds of data have.

    Attributes:
      kind: "text" or "images"; models and objectives name the one that they take.
      source_base: the class that its sources derive from.
      room: where its sources are.
      source: what is read.
      folder: where prepared datasets, token files and images are cached.
      validation_fraction: share held out, chosen by a hash of the name (of a document
        or an image); must be 0 for a source that names a validation split of its own.
      prefetch: batches read ahead.
      workers: processes that tokenise, or threads that read images; 0: one a core.
      watchdog_secs: preparing the data that takes longer ends the process with a
        message; 0 turns it off.
    """

    kind = ""
    source_base = Node
    room = ""
    source: Node | None = None
    folder: str = "~/.cache/moe_jax"
    validation_fraction: float = 0.05
    prefetch: int = 4
    workers: int = 0
    watchdog_secs: float = 86400.0

    def problems(self, path, root):
        if self.source is None:
            yield f"{path}.source is not set: choose one of {self.room}"
        elif not isinstance(self.source, self.source_base):
            yield (
                f"{path}.source={type(self.source).__name__}: is no source of "
                f"{self.kind}; choose one of {self.room}"
            )
        if not 0 <= self.validation_fraction < 1:
            yield (
                f"{path}.validation_fraction={self.validation_fraction}: "
                "must lie in [0, 1)"
            )
        for name in ("prefetch", "workers", "watchdog_secs"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"


class SourceConfig(Node):
    """Base of the sources of text (`data/sources/`)."""

    __slots__ = ()


class ImageSourceConfig(Node):
    """Base of the sources of images (`data/images/sources/`)."""

    __slots__ = ()


class TokenizerConfig(Node):
    """Base of the tokenizers (`data/tokenizers.py`)."""

    __slots__ = ()


class OptimizerConfig(Node):
    """Base of the optimizers (`train/optimizers.py`)."""

    __slots__ = ()


class ScheduleConfig(Node):
    """Base of the learning rate schedules (`train/schedules.py`)."""

    __slots__ = ()


class ProcessConfig(Node):
    """Base of the noise processes (`diffusion/processes/`)."""

    __slots__ = ()

    @property
    def network_ends(self) -> tuple[float, float]:
        """What the network sees as time of data, and of noise."""
        raise NotImplementedError


class TimesConfig(Node):
    """Base of the distributions of diffusion times (`diffusion/times.py`)."""

    __slots__ = ()


class LossWeightConfig(Node):
    """Base of the weights of a denoising loss by time (`diffusion/weights.py`)."""

    __slots__ = ()


class PairingConfig(Node):
    """Base of the choices of noise for an image (`diffusion/pairing.py`)."""

    __slots__ = ()


class GuidanceConfig(Node):
    """Base of the guidances of a sampler (`diffusion/guidance.py`)."""

    __slots__ = ()


class SamplerConfig(Node):
    """Base of the samplers of images (`diffusion/samplers/`)."""

    __slots__ = ()
