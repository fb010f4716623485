"""The typed configuration tree and its validation.

An experiment is a file with `get_config()` that returns a `Config`. Where there is a
choice of method, the class of a sub-config picks the implementation, so that an
option of one method cannot be set on another. Those classes live beside the code
that they configure and derive from the bases (`config_bases`); this module imports none
of them and needs no JAX. `config_json` writes and reads configs.

`validate` runs after all command line overrides and before any device work. It
collects every problem of the tree in one error.
"""

import dataclasses
import math
from collections.abc import Iterator

from moe_jax.config_bases import (  # noqa: F401  Offered here too.
    AttentionConfig,
    BaseDataConfig,
    BaseEvalConfig,
    DispatchConfig,
    ExpertsConfig,
    FeedForwardConfig,
    GuidanceConfig,
    ImageSourceConfig,
    InputMaskConfig,
    LossWeightConfig,
    ModelConfig,
    Node,
    NoiseConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PairingConfig,
    ProcessConfig,
    RopeScalingConfig,
    SamplerConfig,
    ScheduleConfig,
    ScorerConfig,
    SelectorConfig,
    SourceConfig,
    TimesConfig,
    TokenizerConfig,
    node,
)
from moe_jax.errors import UserError

_DTYPES = ("float32", "bfloat16", "float64")


@node
class MeshConfig(Node):
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
      data: batch split, parameters replicated; -1 takes the devices that remain. The
        only axis that may span slices.
      fsdp: batch split, parameters sharded and gathered where they are used.
      expert: experts split over devices; also splits the batch.
      context: sequence split.
      tensor: heads, feed-forward width and vocabulary split.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes with -1 filled in for `num_devices` devices."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if sizes["data"] == -1:
            rest = math.prod(v for k, v in sizes.items() if k != "data")
            sizes["data"] = max(1, num_devices // rest)
        return sizes

    def fixed_devices(self) -> int:
        """Devices this mesh needs at least: `data=-1` counts as one."""
        return math.prod(abs(getattr(self, f.name)) for f in dataclasses.fields(self))

    def problems(self, path, root):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1 and not (field.name == "data" and size == -1):
                extra = " or -1 (all that remain)" if field.name == "data" else ""
                yield f"{path}.{field.name}={size}: must be at least 1{extra}"


@node
class DataConfig(BaseDataConfig):
    """Where text comes from and how it becomes rows of tokens.

    Attributes:
      source: which documents.
      tokenizer: bytes to token ids.
      sequence_length: tokens per row, S.
    """

    kind = "text"
    source_base = SourceConfig
    room = "moe_jax.data.sources"
    source: SourceConfig | None = None
    tokenizer: TokenizerConfig | None = None
    sequence_length: int = 256

    def problems(self, path, root):
        yield from BaseDataConfig.problems(self, path, root)
        if self.tokenizer is None:
            yield f"{path}.tokenizer is not set: Bytes() needs no file"
        if self.sequence_length < 2:
            yield f"{path}.sequence_length={self.sequence_length}: must be at least 2"


@node
class TrainConfig(Node):
    """The loop.

    Attributes:
      steps: optimizer steps.
      batch_size: sequences per optimizer step, over all devices and hosts.
      accumulation: micro-batches per optimizer step; divides `batch_size`.
      gather_once: gather the weights once per step and not for each use: all of them
        are then in memory, whole, in the type of the computation.
      offload_optimizer: keep the optimizer's arrays in the memory of the host; they
        come to the device for the update.
      ema_decay: decay of the average of parameters; 0 keeps none.
      nan_policy: "skip" leaves the state as it was and counts; "stop" ends the run.
      max_skipped: with "skip", consecutive bad steps after which the run ends.
      warm_start: workdir of another run whose parameters, and router state if its shape
        is the same, to begin from.
      agree_every: steps between comparisons of the copies of replicated state over
        devices, which must be equal bit for bit; the run ends where they are not.
        0 compares never.
      watchdog_secs: a step, or the wait for its batch, or the start, that takes longer
        ends the process with a message; 0 turns it off.
      watchdog_compile_secs: the same for compiling the step.
      ledger: write down which rows each process reads, in `ledger` in the workdir; see
        `moe-jax ledger`.
      compilation_cache: folder of JAX's persistent cache; "" turns it off.
      xla_options: "xla_NAME=VALUE" with spaces between them, for the train step, beside
        those of `parallel.compiler`; "xla_NAME=" leaves one of those out.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    gather_once: bool = False
    offload_optimizer: bool = False
    ema_decay: float = 0.0
    nan_policy: str = "skip"
    max_skipped: int = 20
    warm_start: str = ""
    agree_every: int = 500
    watchdog_secs: float = 600.0
    watchdog_compile_secs: float = 3600.0
    ledger: bool = False
    compilation_cache: str = "~/.cache/moe_jax/compiled"
    xla_options: str = ""

    def problems(self, path, root):
        if self.steps < 1:
            yield f"{path}.steps={self.steps}: must be at least 1"
        if self.batch_size < 1:
            yield f"{path}.batch_size={self.batch_size}: must be at least 1"
        if self.accumulation < 1 or self.batch_size % max(1, self.accumulation):
            yield (
                f"{path}.batch_size={self.batch_size} is not divisible by "
                f"{path}.accumulation={self.accumulation}; it takes one of "
                f"{divisors(self.batch_size)}"
            )
        if not 0 <= self.ema_decay < 1:
            yield f"{path}.ema_decay={self.ema_decay}: must lie in [0, 1)"
        if self.nan_policy not in ("skip", "stop"):
            yield f"{path}.nan_policy={self.nan_policy!r}: must be 'skip' or 'stop'"
        if self.max_skipped < 1:
            yield f"{path}.max_skipped={self.max_skipped}: must be at least 1"
        for name in ("agree_every", "watchdog_secs", "watchdog_compile_secs"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        for entry in self.xla_options.split():
            if not entry.startswith("xla_") or "=" not in entry:
                yield (
                    f"{path}.xla_options={self.xla_options!r}: {entry!r} is not an "
                    "option; write xla_NAME=VALUE, with spaces between them"
                )


@node
class EvalConfig(BaseEvalConfig):
    """Held-out evaluation of text.

    Attributes:
      baselines: compare with gzip and an order-2 byte model at the end.
      samples: texts printed at the end.
      sample_tokens: new tokens in each.
      prompt: what they begin with.
    """

    kind = "text"
    baselines: bool = False
    samples: int = 0
    sample_tokens: int = 200
    prompt: str = ""

    def problems(self, path, root):
        yield from BaseEvalConfig.problems(self, path, root)
        for name in ("samples", "sample_tokens"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"


@node
class CheckpointConfig(Node):
    """What is saved when.

    Attributes:
      folder: where to, a local path, gs:// or s3://; "" is `checkpoints` in the
        workdir.
      every: steps between checkpoints; the last step is always saved.
      keep_last: newest checkpoints kept.
      keep_every: a checkpoint at a multiple of this many steps is kept for good;
        0 keeps none.
      retries: saves that fail in a row, training going on, before the run ends; 0 ends
        it at the first.
      retry_secs: before the first of them is tried again; twice as long each time, at
        most ten minutes. (8 failures of 10 s, the defaults, are half an hour.)
      watchdog_secs: restoring, or a save as far as training waits for it, that takes
        longer ends the process with a message; 0 turns it off.
    """

    folder: str = ""
    every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    retries: int = 8
    retry_secs: float = 10.0
    watchdog_secs: float = 1800.0

    def problems(self, path, root):
        least_of = {"every": 1, "keep_last": 1, "keep_every": 0}
        least_of |= {"retries": 0, "retry_secs": 0, "watchdog_secs": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                yield f"{path}.{name}={getattr(self, name)}: must be at least {least}"
        if self.keep_every and self.keep_every % max(1, self.every):
            yield (
                f"{path}.keep_every={self.keep_every} is not a multiple of "
                f"{path}.every={self.every}: those steps are never saved"
            )


@node
class LogConfig(Node):
    """What the user sees while training.

    Attributes:
      every: steps between lines on the console (metrics.jsonl has every step).
      tensorboard: write TensorBoard event files.
    """

    every: int = 20
    tensorboard: bool = True

    def problems(self, path, root):
        if self.every < 1:
            yield f"{path}.every={self.every}: must be at least 1"


@node
class Config(Node):
    """One experiment."""

    seed: int = 0
    model: ModelConfig | None = None
    objective: ObjectiveConfig | None = None
    data: BaseDataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: BaseEvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def problems(self, path, root):
        for name in ("model", "objective", "optimizer", "schedule"):
            if getattr(self, name) is None:
                yield f"{path}.{name} is not set"
        if not 0 <= self.seed < 2**31:
            yield f"{path}.seed={self.seed}: must lie in [0, 2**31)"
        shards = self.mesh.fsdp * self.mesh.expert * max(1, self.mesh.data)
        micro = self.train.batch_size // max(1, self.train.accumulation)
        if shards > 0 and micro % shards:
            yield (
                f"{path}.train.batch_size / accumulation = {micro} is not divisible "
                f"by data * fsdp * expert = {shards} of {path}.mesh; set batch_size "
                f"to a multiple of {shards * max(1, self.train.accumulation)}"
            )
        if self.mesh.context > 0 and self.positions() % self.mesh.context:
            rows = f"the {self.positions()} positions of a row"
            if isinstance(self.data, DataConfig):
                rows = f"{path}.data.sequence_length={self.positions()}"
            yield (
                f"{rows} is not divisible by {path}.mesh.context={self.mesh.context}; "
                f"context takes one of {divisors(self.positions())}"
            )

    def positions(self) -> int:
        """Positions of a row in the model, S; 0 while the model is not set."""
        if isinstance(self.data, DataConfig):
            return self.data.sequence_length
        return self.model.positions(self.data) if self.model is not None else 0


def divisors(n: int, most: int = 12) -> list[int]:
    """The divisors of n, at most `most` of them, for messages."""
    found = [d for d in range(1, min(n, 4096) + 1) if n % d == 0]
    return found[:most]


def dtype_problems(owner: Node, path: str, *names: str) -> Iterator[str]:
    """Problems of the fields `names` that hold a floating point type's name."""
    for name in names:
        value = getattr(owner, name)
        if value not in _DTYPES:
            yield f"{path}.{name}={value!r}: must be one of {list(_DTYPES)}"


def children(value: Node, path: str) -> Iterator[tuple[str, Node]]:
    """The sub-configs of `value` with their paths, those in tuples too."""
    for field in dataclasses.fields(value):
        child = getattr(value, field.name)
        items = child if isinstance(child, tuple) else (child,)
        for i, item in enumerate(items):
            if isinstance(item, Node):
                index = f"[{i}]" if isinstance(child, tuple) else ""
                yield f"{path}.{field.name}{index}", item


def all_problems(value: Node, path: str, root: Config) -> Iterator[str]:
    """Problems of a config and of everything below it."""
    yield from value.problems(path, root)
    for child_path, child in children(value, path):
        yield from all_problems(child, child_path, root)


def require_kind(config: Config, kind: str, what: str) -> None:
    """Raises UserError where `what` needs data of another kind than the config has."""
    given = config.data
    if given.kind != kind:
        raise UserError(
            f"{what} needs {kind}, and config.data={type(given).__name__} holds "
            f"{given.kind}"
        )


def _kind_problems(config: Config, path: str) -> Iterator[str]:
    """Where the model or the objective is made for another kind of data."""
    given = config.data
    nodes = {"model": config.model, "objective": config.objective}
    wanted = {k: v for k, v in nodes.items() if v and v.data_kind != given.kind}
    if wanted:
        who = " and ".join(f"{k}={type(v).__name__}" for k, v in wanted.items())
        kinds = sorted({v.data_kind for v in wanted.values()})
        yield (
            f"{path}.data={type(given).__name__} holds {given.kind}, but {path}.{who} "
            f"needs {' and '.join(kinds)}; change one of them"
        )
    elif config.eval.kind != given.kind:
        yield (
            f"{path}.eval={type(config.eval).__name__} evaluates {config.eval.kind}, "
            f"and {path}.data={type(given).__name__} holds {given.kind}; set eval to "
            "ImageEvalConfig() for images, EvalConfig() for text"
        )


def validate(config: Config, path: str = "config") -> Config:
    """Checks every rule of the tree.

    Raises:
      UserError: one message that lists all problems with flag path and mend.
    """
    # Rules of the tree may ask the data for what only one kind has.
    found = list(_kind_problems(config, path))
    found = found or list(all_problems(config, path, config))
    if found:
        head = f"{len(found)} problem{'s' * (len(found) > 1)} in the config:"
        raise UserError("\n".join([head, *(f"  --{p}" for p in found)]))
    return config
