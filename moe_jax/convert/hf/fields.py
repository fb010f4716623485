"""Reading a config.json: types checked, nothing left out in silence."""

from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError, nearest

_REQUIRED = object()
# They say nothing about the numbers of a model, or are dealt with elsewhere.
_HARMLESS = frozenset(
    """_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype
    eos_token_id ep_size experts_per_token head_dim initial_context_length
    initializer_range max_position_embeddings model_type output_router_logits
    pad_token_id pretraining_tp qk_head_dim quantization_config sep_token_id torch_dtype
    transformers_version use_cache num_key_value_heads
    original_max_position_embeddings""".split()
)


class Fields:
    """A config.json, read field by field.

    Attributes:
      data: the object.
      where: its file, for messages.

    Raises:
      UserError: `data` is no object.
    """

    def __init__(self, data: Mapping[str, Any], where: str):
        if not isinstance(data, Mapping):
            raise UserError(f"{where}: must be an object, not {data!r}")
        self.data = data
        self.where = where
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value of any type; null counts as absent.

        Raises:
          UserError: it is absent and has no default.
        """
        self._read.add(name)
        value = self.data.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            hint = nearest(name, self.data)
            raise UserError(f"{self.where}: {name} is missing{hint}")
        return default

    def _of_type(self, name: str, default: Any, types: tuple[type, ...]) -> Any:
        value = self.get(name, default)
        wrong_bool = isinstance(value, bool) and bool not in types
        if value is not default and (wrong_bool or not isinstance(value, types)):
            raise UserError(f"{self.where}: {name}={value!r} is no {types[0].__name__}")
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        value = self._of_type(name, default, (int,))
        if value is not default and value < 0:
            raise UserError(f"{self.where}: {name}={value} must not be negative")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._of_type(name, default, (float, int))
        return float(value) if value is not default else value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return self._of_type(name, default, (bool,))

    def items(self, name: str, default: Any = _REQUIRED) -> list:
        return self._of_type(name, default, (list,))

    def only(self, name: str, *allowed: Any, default: Any = _REQUIRED) -> Any:
        """A value that must be one of those that can be expressed.

        Raises:
          UserError: it is another.
        """
        value = self.get(name, allowed[0] if default is _REQUIRED else default)
        if value not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise self.refuse(name, f"not supported; {shown} is")
        return value

    def refuse(self, name: str, why: str) -> UserError:
        """The error for a value that cannot be expressed."""
        return UserError(f"{self.where}: {name}={self.data.get(name)!r}: {why}")

    def notes(self) -> list[str]:
        """A line for each field with a value that nothing has looked at."""
        unread = sorted(self.data.keys() - self._read - _HARMLESS)
        # What only training would use: another dropout, another noise.
        return [
            f"{self.where}: {name}={self.data[name]!r} is not used"
            for name in unread
            if self.data[name] not in (None, False, 0)
        ]
