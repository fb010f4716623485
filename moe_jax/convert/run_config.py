"""The config of a workdir whose model comes from elsewhere."""

import copy
import os
from typing import Any

from moe_jax.config import Config, DataConfig, MeshConfig
from moe_jax.convert import folder
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes, HuggingFaceTokenizer
from moe_jax.errors import UserError
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.layer import MoE
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine

# What a config says about how a model runs, and not what it is.
RUN = ("attention", "dtype", "param_dtype", "remat")
RUN_MOE = ("dispatch", "expert_axes", "balance", "noise")
_LONGEST = 1024
# Folder in a workdir for what came with a model.
BESIDE = "hugging_face"


def of_config(model: Decoder, config: Config) -> Config:
    """A config with the imported model, which runs as that of the config would.

    Raises:
      UserError: the config's model is no decoder, or it has correction biases where the
        imported one has none, or the reverse.
    """
    config, theirs = copy.deepcopy(config), config.model
    if not isinstance(theirs, Decoder):
        raise UserError(f"--config: its model is a {type(theirs).__name__}, no Decoder")
    if config.checkpoint.folder:
        raise UserError(
            f"--config.checkpoint.folder={config.checkpoint.folder}: an imported model "
            "is written to the workdir; leave it empty"
        )
    for name in RUN:
        setattr(model, name, copy.deepcopy(getattr(theirs, name)))
    ours, theirs_ff = model.feed_forward, theirs.feed_forward
    if isinstance(ours, MoE) and isinstance(theirs_ff, MoE):
        _check_bias(ours.balance.bias_rate, theirs_ff.balance.bias_rate)
        for name in RUN_MOE:
            setattr(ours, name, copy.deepcopy(getattr(theirs_ff, name)))
    model.mtp = theirs.mtp
    config.model = model
    return config


def _check_bias(needed: float, given: float) -> None:
    where = f"--config.model.feed_forward.balance.bias_rate={given}"
    if needed and not given:
        raise UserError(
            f"{where}: the checkpoint has correction biases, which a run without a "
            f"rate does not keep; set it to {needed}, or to 1e-9 for them to stay"
        )
    if given and not needed:
        raise UserError(
            f"{where}: the checkpoint has no correction biases; set it to 0"
        )


def default(model: Decoder, checkpoint: str, workdir: str, longest: int) -> Config:
    """A config for those who name none: AdamW at 1e-5, on Python's own library.

    Args:
      model: that is imported.
      checkpoint: its folder.
      workdir: where the tokenizer will be.
      longest: tokens of a text, as config.json has it.
    """
    return Config(
        model=model,
        objective=NextToken(),
        data=DataConfig(
            source=PythonSource(),
            tokenizer=tokenizer(checkpoint, workdir),
            sequence_length=max(2, min(longest, _LONGEST)),
        ),
        optimizer=AdamW(learning_rate=1e-5),
        schedule=Cosine(),
        mesh=MeshConfig(),
    )


def tokenizer(checkpoint: str, workdir: str) -> Any:
    """That of the model, at the place where it will be; else bytes."""
    if not os.path.exists(os.path.join(checkpoint, "tokenizer.json")):
        return Bytes()
    path = os.path.join(os.path.abspath(workdir), BESIDE, "tokenizer.json")
    bos, eos = _special(checkpoint)
    return HuggingFaceTokenizer(path=path, bos=bos, eos=eos)


def _special(checkpoint: str) -> tuple[str, str]:
    """Begin and end of document; a begin only where the tokenizer itself adds it."""
    path = os.path.join(checkpoint, "tokenizer_config.json")
    if not os.path.exists(path):
        return "", ""
    said = folder.read_json(path)
    bos, eos = (_content(said.get(name)) for name in ("bos_token", "eos_token"))
    rules = folder.read_json(os.path.join(checkpoint, "tokenizer.json"))
    adds = said.get("add_bos_token") or bos in _pieces(rules.get("post_processor"))
    return (bos if adds else ""), eos


def _content(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _pieces(value: Any) -> set[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        return set().union(*map(_pieces, value.values()))
    if isinstance(value, list):
        return set().union(*map(_pieces, value))
    return {value} if isinstance(value, str) and value else set()
