"""Which rows belong to which step: by arithmetic, for any number of processes."""

import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class Stream:
    """The endless stream of training rows of one or several sources: `stream[n]`.

    Of one source it has all rows in an order drawn from the seed, then all in another
    one, and so on. Several take turns in a fixed rhythm of `sum(weights)` elements
    (`rhythm`), and each has an order of its own. Element n is found without those
    before it.

    Args:
      sizes: rows of each source; the rows of the next are numbered behind them.
      weights: shares of the sources, whole numbers.
      seed: of the orders, in [0, 2**32).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[int], seed: int):
        common = math.gcd(*weights)
        self._weights = [weight // common for weight in weights]
        self._turn = rhythm(self._weights)
        self._before = np.zeros_like(self._turn)  # turns of the same source so far
        for source, weight in enumerate(self._weights):
            self._before[self._turn == source] = np.arange(weight)
        self._first = np.cumsum([0, *sizes[:-1]]).tolist()
        self._orders = [
            grain.MapDataset.range(size).seed(_seed(seed, source)).shuffle().repeat()
            for source, size in enumerate(sizes)
        ]

    def __getitem__(self, n: int) -> int:
        """Number of the row at place n."""
        rounds, place = divmod(n, len(self._turn))
        source = int(self._turn[place])
        own = rounds * self._weights[source] + int(self._before[place])
        return self._first[source] + int(self._orders[source][own])


def rhythm(weights: Sequence[int]) -> np.ndarray:
    """Whose turn it is, (sum of the weights,): source i comes `weights[i]` times.

    It is always the turn of the source that lags most behind its share, the first of
    those that lag alike. So none is ever a whole turn ahead of its share.
    """
    total, weights = sum(weights), np.array(weights, np.int64)
    lag = np.zeros_like(weights)
    turns = np.zeros(total, np.int64)
    for place in range(total):
        lag += weights
        turns[place] = chosen = int(np.argmax(lag))
        lag[chosen] -= total
    return turns


def _seed(seed: int, source: int) -> int:
    """Sources of equal size must not have equal orders."""
    if source == 0:
        return seed
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def spread(sizes: Sequence[int]) -> Sequence[int]:
    """All rows of all sources once, each source's in order and evenly spread."""
    if len(sizes) == 1:
        return range(sizes[0])
    places = [(np.arange(size) + 0.5) / max(1, size) for size in sizes]
    return np.argsort(np.concatenate(places), kind="stable")


def train_batches(
    read: Callable[[list[int], int], Batch],
    stream: Stream,
    *,
    batch_size: int,
    start_step: int,
    num_steps: int,
    rows: tuple[int, int] | None = None,
    prefetch: int = 4,
    numbered: bool = False,
) -> Iterator[Batch]:
    """This process's part of the batches of `num_steps` steps from `start_step`.

    The stream's elements [s*B, (s+1)*B) are step s, so the batch is the same for any
    number of processes. Starting at a later step costs nothing.

    Args:
      read: for numbers of rows, and the place of the first in the stream (the others
        follow it), these rows.
      stream: of the rows' numbers.
      batch_size: rows in the batch of all processes, B.
      start_step: the first step to give.
      num_steps: how many steps to give.
      rows: first row and number of rows of the batch to give; default: all.
      prefetch: batches read ahead in a thread; 0 reads in the caller's.
      numbered: whether a batch has `row` too: the numbers that were read, int64 (b,).
    """
    first, count = rows or (0, batch_size)

    def batch(step: int) -> Batch:
        begin = step * batch_size + first
        numbers = [stream[n] for n in range(begin, begin + count)]
        found = read(numbers, begin)
        return found | {"row": np.array(numbers, np.int64)} if numbered else found

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
