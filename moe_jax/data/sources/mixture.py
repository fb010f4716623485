"""Several sources at once, each with its share of the rows."""

from collections.abc import Iterator

from moe_jax import config as config_lib

# The order repeats after the sum of the weights, and is written down that far.
_MOST = 100_000


@config_lib.node
class Mixture(config_lib.SourceConfig):
    """A weighted mixture of sources.

    Of every `sum(weights)` rows of the training stream, source i gives exactly
    `weights[i]`. Each goes through all of its own rows in a shuffled order, then
    through all of them in another one, however long the others are.

    Attributes:
      sources: each a source of text, but no mixture.
      weights: whole numbers, one a source: (7, 3) for 0.7 and 0.3.
    """

    sources: tuple = ()
    weights: tuple = ()

    def problems(self, path, root):
        if not self.sources:
            yield f"{path}.sources=(): must hold at least one source"
        for number, source in enumerate(self.sources):
            kind = type(source)
            if kind is Mixture or not isinstance(source, config_lib.SourceConfig):
                yield (
                    f"{path}.sources[{number}]={kind.__name__}: must be a source of "
                    "text, and no mixture; choose one of moe_jax.data.sources"
                )
        yield from self._weight_problems(f"{path}.weights={self.weights!r}")

    def _weight_problems(self, where: str) -> Iterator[str]:
        if len(self.weights) != len(self.sources):
            yield (
                f"{where}: must hold one weight a source, {len(self.sources)}, and "
                f"holds {len(self.weights)}"
            )
        if not all(type(w) is int and w > 0 for w in self.weights):
            yield f"{where}: must be whole numbers from 1, as (7, 3) for 0.7 and 0.3"
        elif sum(self.weights) > _MOST:
            yield f"{where}: their sum must be at most {_MOST:,}; round them"
