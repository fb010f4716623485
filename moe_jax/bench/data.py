"""The input by itself: text to token file, that to batches, those to devices."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.bench.timing import Times
from moe_jax.config import Config
from moe_jax.data import pipeline, sources, token_file, tokenizers
from moe_jax.errors import UserError
from moe_jax.parallel import batches

# What is measured of a token file, in order; each contains the one before.
STAGES = ("rows", "ahead", "placed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Rows of one length from a token file.

    Attributes:
      sequence_length: S.
      batch_size: rows of a batch.
      tokens: of one timed run.
      seconds: of each of `STAGES`: packed in the caller's thread, read ahead in the
        pipeline's own, and made arrays over the mesh.
    """

    sequence_length: int
    batch_size: int
    tokens: int
    seconds: dict[str, Times]

    def rate(self, stage: str) -> float:
        """Tokens a second, by the median."""
        return self.tokens / self.seconds[stage].median


def tokenise(config: Config, folder: pathlib.Path) -> tuple[int, float]:
    """Makes token files of the config's text in `folder`; tokens, and seconds."""
    tokenizer = tokenizers.make_tokenizer(config.data.tokenizer)
    loaded = [(data, sources.load(data)) for data in sources.each(config.data)]
    tokens, begin = 0, time.perf_counter()
    for data, source in loaded:
        manifest, _ = token_file.open_or_build(folder, source, data, tokenizer)
        tokens += sum(split["tokens"] for split in manifest["splits"].values())
    return tokens, time.perf_counter() - begin


def measure(
    config: Config, mesh: jax.sharding.Mesh, lengths: list[int], size: int, repeats: int
) -> Iterator[Row]:
    """One row a length, from the token files of `config.data`.

    Args:
      config: its data; the length is replaced.
      mesh: over which batches are placed.
      lengths: S of each row.
      size: tokens of a timed run, about; a batch has a sixteenth of them.
      repeats: timed runs of each stage, the stages in turn.
    """
    for length in lengths:
        config.data.sequence_length = length
        shards = mesh.size
        rows = max(1, size // 16 // length // shards) * shards
        count = max(2, size // (rows * length))
        data = pipeline.prepare(config)
        if data.num_rows("train") < rows:
            raise UserError(
                f"--lengths={length}: the text has {data.num_rows('train')} rows of "
                f"that length, and a batch has {rows}; give more text or fewer --tokens"
            )
        seconds = {stage: [] for stage in STAGES}
        for number in range(repeats + 1):
            for place, stage in enumerate(STAGES):
                # Steps that none before has read.
                first = count * (number * len(STAGES) + place)
                given = data.train_batches(
                    batch_size=rows,
                    seed=config.seed,
                    start_step=first,
                    num_steps=count,
                    prefetch=0 if stage == "rows" else max(1, config.data.prefetch),
                )
                taken = _run(given, mesh if stage == "placed" else None, rows)
                if number:  # The first warms up.
                    seconds[stage].append(taken)
        yield Row(
            sequence_length=length,
            batch_size=rows,
            tokens=rows * length * count,
            seconds={stage: Times(tuple(taken)) for stage, taken in seconds.items()},
        )


def _run(given: Iterator[Any], mesh: jax.sharding.Mesh | None, rows: int) -> float:
    begin = time.perf_counter()
    for batch in given:
        if mesh is not None:
            jax.block_until_ready(batches.put(batch, mesh, rows, 0))
    return time.perf_counter() - begin
