"""Which rows belong to which step: by arithmetic, for any number of processes."""

from collections.abc import Callable, Iterator

import grain
import numpy as np

Batch = dict[str, np.ndarray]


def train_batches(
    read: Callable[[list[int], int], Batch],
    num_rows: int,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    rows: tuple[int, int] | None = None,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """This process's part of the batches of `num_steps` steps from `start_step`.

    All rows in an order drawn from `seed`, then all in another one, and so on: the
    stream's elements [s*B, (s+1)*B) are step s, so the batch is the same for any number
    of processes. Starting at a later step costs nothing.

    Args:
      read: for numbers of rows, and the place of the first in the stream (the others
        follow it), these rows.
      num_rows: of the split.
      batch_size: rows in the batch of all processes, B.
      seed: of the order, in [0, 2**32).
      start_step: the first step to give.
      num_steps: how many steps to give.
      rows: first row and number of rows of the batch to give; default: all.
      prefetch: batches read ahead in a thread; 0 reads in the caller's.
    """
    first, count = rows or (0, batch_size)
    order = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()

    def batch(step: int) -> Batch:
        begin = step * batch_size + first
        return read([order[i] for i in range(begin, begin + count)], begin)

    steps = grain.MapDataset.range(start_step, start_step + num_steps).map(batch)
    # A row is a slice of a mapped file: more threads than one only contend.
    options = grain.ReadOptions(
        num_threads=min(1, prefetch), prefetch_buffer_size=prefetch
    )
    return iter(steps.to_iter_dataset(options))


def eval_batches(
    read: Callable[[range], Batch],
    num_rows: int,
    *,
    batch_size: int,
    max_batches: int = 0,
    rows: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """This process's part of the batches of all rows, in order.

    All processes see equally many batches of one shape: in the last, numbers past the
    split's rows are asked for.

    Args:
      read: for numbers of rows, these; past the last, rows in which nothing counts.
      num_rows: of the split; without rows there are no batches.
      batch_size: rows in the batch of all processes.
      max_batches: how many to give at most; 0 gives all.
      rows: first row and number of rows of each batch to give; default: all.
    """
    first, count = rows or (0, batch_size)
    num_batches = -(-num_rows // batch_size)
    if max_batches:
        num_batches = min(num_batches, max_batches)
    begins = (number * batch_size + first for number in range(num_batches))
    return (read(range(begin, begin + count)) for begin in begins)
