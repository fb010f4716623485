"""A workdir becomes a folder that `transformers` loads."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax import config_json
from moe_jax.config import Config
from moe_jax.convert import folder, from_hf, mapping, run_config, store, target
from moe_jax.convert.hf import FAMILIES
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.convert.store import Tensors
from moe_jax.errors import UserError
from moe_jax.infer import load
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.train.setup import Parts

TYPES = {"float32": "F32", "bfloat16": "BF16"}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ANOTHER_KIND = "config.model: of another kind"
# Of an imported config.json, what no longer holds.
_STALE = ("quantization_config", "auto_map", "torch_dtype")


def convert(
    workdir: str,
    out: str,
    config: Config,
    *,
    family: str = "",
    dtype: str = "",
    most_bytes: int = 5 * 10**9,
    step: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the model of a workdir as a folder of Hugging Face.

    Args:
      workdir: of a run.
      out: the folder, which is not there yet.
      config: of the run, with the mesh to load it on; JAX has been started for it.
      family: name of one; "": the one it came from, else the first that fits.
      dtype: one of `TYPES`; "": as it was imported, else as the parameters are.
      most_bytes: of a file.
      step: of the checkpoint; 0: the newest.
      say: shows a line to the user.

    Raises:
      UserError: no family expresses the model, the folder cannot be written, or several
        processes were started.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"one process writes --out={out}, but {jax.process_count()} were started; "
            "start one, with --mesh for the devices that it has"
        )
    kept = os.path.join(workdir, run_config.BESIDE)
    chosen = choose(config.model, family or _imported(kept).get("model_type", ""))
    loaded = load.load(workdir, config, step)
    for note in loaded.notes:
        say(note)
    state = loaded.state
    leaves = mapping.leaves_of(state.eval_params, state.router_state)
    line = write(out, chosen, loaded.parts, leaves, kept, dtype, most_bytes)
    say(line)


def write(
    out: str,
    family: Family,
    parts: Parts,
    leaves: Mapping[str, Any],
    kept: str,
    dtype: str = "",
    most_bytes: int = 5 * 10**9,
) -> str:
    """Writes arrays as a folder of Hugging Face.

    Args:
      out: the folder, which is not there yet.
      family: that expresses the model.
      parts: of the run.
      leaves: of `mapping.leaves_of`.
      kept: folder of what came with the model; it need not be there.
      dtype: as for `convert`.
      most_bytes: of a file.

    Returns:
      A line about what was written.

    Raises:
      UserError: the folder cannot be written.
    """
    config = parts.config
    tensors = store.by_tensor(mapping.places(family, parts.model, leaves))
    types = _types(tensors, family, kept, dtype, config.model.param_dtype)
    shards = store.files(store.planned(tensors, types), most_bytes)
    fields = _config(family, config, _imported(kept), types)
    with target.made_whole(out, "out") as made:
        with jax.set_mesh(parts.mesh):
            store.write(made, tensors, shards, leaves)
        with open(os.path.join(made, folder.CONFIG), "w", encoding="utf-8") as file:
            json.dump(fields, file, indent=2, sort_keys=True)
        if os.path.isdir(kept):
            folder.copy_beside(kept, made)
    count, size = len(tensors), sum(t.nbytes for s in shards.values() for t in s)
    return (
        f"{family.architecture}: {count} tensors, {size:,} bytes, {len(shards)} files"
    )


def _imported(kept: str) -> dict[str, Any]:
    """The config.json that the model came with, or {}."""
    path = os.path.join(kept, folder.CONFIG)
    return folder.read_json(path) if os.path.exists(path) else {}


def choose(model: Any, name: str) -> Family:
    """The family that expresses a model.

    Args:
      model: config of the model.
      name: of a family; "": the first that fits.

    Raises:
      UserError: there is none, with what stands in the way.
    """
    if not isinstance(model, Decoder):
        raise UserError(f"a {type(model).__name__} cannot be exported, a Decoder can")
    if name and name not in FAMILIES:
        raise UserError(f"--family={name}: must be one of {', '.join(FAMILIES)}")
    found = {}
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        found[family.model_type] = lost(family, model)
        if not found[family.model_type]:
            return family
    distance = lambda name: (found[name] == [_ANOTHER_KIND], len(found[name]))
    nearest = min(found, key=distance)
    shown = "\n".join(f"  {line}" for line in found[nearest][:12])
    raise UserError(
        f"this model is not one that {'' if name else 'any family, not even '}"
        f"{nearest} can express (here -> there):\n{shown}"
    )


def lost(family: Family, model: Decoder) -> list[str]:
    """What changes in a model on its way through a family's config.json."""
    try:
        data = {"max_position_embeddings": 2**20, **family.fields(copy.deepcopy(model))}
        back = family.decoder(Fields(data, family.model_type))
        back.mtp = model.mtp if family.ahead else 0
    except UserError as error:
        return [str(error)]
    except (AttributeError, TypeError, ZeroDivisionError):
        # It asked for a field of another feed-forward, selector or attention.
        return [_ANOTHER_KIND]
    return config_json.differences(
        _what_it_is(model), _what_it_is(back), "config.model"
    )


def _what_it_is(model: Decoder) -> Decoder:
    """A config without what only says how it is trained and run."""
    model = copy.deepcopy(model)
    plain = Decoder()
    for name in (*run_config.RUN, "init_std"):
        setattr(model, name, getattr(plain, name))
    if model.latent is None:
        model.num_kv_heads, model.head_dim = model.kv_heads, model.width_per_head
    moe = model.feed_forward
    if isinstance(moe, MoE):
        biased = moe.balance.bias_rate > 0
        form = moe.balance.bias_form if biased else "additive"
        moe.balance = Balance(bias_rate=float(biased), bias_form=form)
        moe.selector = _canonical(moe.selector, biased)
        moe.dispatch, moe.noise = MoE().dispatch, None
        moe.expert_axes, moe.allow_noncausal = MoE().expert_axes, False
        for name in ("init_std", "dtype"):
            if hasattr(moe.scorer, name):
                setattr(moe.scorer, name, getattr(type(moe.scorer)(), name))
    return model


def _canonical(selector: Any, biased: bool) -> Any:
    """One of several selectors that choose and weigh alike."""
    if isinstance(selector, GroupLimited) and selector.num_groups == 1:
        names = ("top_k", "score", "renormalize", "scale")
        selector = TopK(**{name: getattr(selector, name) for name in names})
    if isinstance(selector, TopK) and selector.softmax == "after" and not biased:
        # A softmax over the chosen ones is one over all, renormalised.
        selector.softmax, selector.renormalize = "before", True
    return selector


def _types(
    tensors: Tensors, family: Family, kept: str, dtype: str, param_dtype: str
) -> dict[str, str]:
    """The type of each tensor of the files, by name."""
    path = os.path.join(kept, from_hf.TYPES_FILE)
    if dtype or not os.path.exists(path):
        most = TYPES[dtype or param_dtype]
        exact = lambda places: places[0].weight.hub in family.float32
        return {n: "F32" if exact(p) else most for n, p in tensors.items()}
    said = folder.read_json(path)
    return {name: said["others"].get(name, said["most"]) for name in tensors}


def _config(
    family: Family, config: Config, imported: Mapping[str, Any], types: dict[str, str]
) -> dict[str, Any]:
    if imported.get("model_type") != family.model_type:
        imported = {}
    names = list(types.values())
    most = max(set(names), key=names.count)
    base = {k: v for k, v in imported.items() if k not in _STALE}
    return {
        "max_position_embeddings": config.data.sequence_length,
        **base,
        **family.fields(copy.deepcopy(config.model)),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": _NAMES[most],
    }
