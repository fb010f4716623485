"""What a run does with one kind of data; text and images have a file each."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from moe_jax.config import Config
from moe_jax.train.setup import Parts
from moe_jax.train.state import TrainState


class Evaluator(Protocol):
    """Scores a state on held-out data."""

    def score(self, state: TrainState, data: Any, max_batches: int = 0) -> dict:
        """Figures over the held-out rows, `loss` among them; {} where there are none.

        Args:
          state: with the parameters to score.
          data: the data.
          max_batches: the first so many batches only; 0: all.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between text and images.

    Attributes:
    unit: what is counted and weighed: "tokens" or "images".
    check: `(config, data)`; raises UserError where the model does not take the data.
    evaluator: `(parts, data) -> Evaluator`.
    of_loss: `(data) -> (loss -> further figures of a step)`.
    line: held-out figures as a line for people.
    finish: `(parts, data, evaluator, recorder, progress, folder)`; scores and shows
      what was learned, and returns the figures of summary.json.
    """

    unit: str
    check: Callable[[Config, Any], None]
    evaluator: Callable[[Parts, Any], Evaluator]
    of_loss: Callable[[Any], Callable[[float], dict[str, float]]]
    line: Callable[[dict[str, Any]], str]
    finish: Callable[..., dict[str, Any]]

    def per_step(self, config: Config) -> int:
        """Units of an optimizer step."""
        positions = config.positions() if self.unit == "tokens" else 1
        return config.train.batch_size * positions


def kind_of(config: Config) -> Kind:
    """The kind of the config's data."""
    # Both know `Kind`.
    from moe_jax.train import images, text

    return {"text": text.KIND, "images": images.KIND}[config.data.kind]
