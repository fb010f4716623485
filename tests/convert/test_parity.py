"""Imported models compute what Hugging Face transformers computes, all in float32.

A family is an entry of `hub_models.CONFIGS`.
"""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")
import hub_models
import torch
import transformers

from moe_jax.config import MeshConfig
from moe_jax.convert import from_hf, load, mapping, tensor_file, to_hf
from moe_jax.infer import generate
from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import Mode
from moe_jax.train import setup

pytestmark = pytest.mark.slow
MESH = MeshConfig(data=1, fsdp=2, expert=4)
LENGTH, FULL, NEW = 64, (64, 41), 32
CAPTURE = Mode(train=False, capture=True)
WITH_LOSS = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe"}


@dataclasses.dataclass
class Pair:
    """A model there and here."""

    name: str
    theirs: Any
    folder: str
    source: from_hf.Source
    parts: setup.Parts
    arrays: Any
    config: Any
    params: Any
    router_state: Any

    @functools.cached_property
    def compute(self):
        """Parameters to logits and aux, and the gradient of the mean loss."""
        model = DecoderModel(self.config.model)

        def run(params):
            hidden, _, aux = model.apply(
                params, self.router_state, inputs(), key=None, mode=CAPTURE
            )
            logits = model.logits(params, hidden)
            targets, weights = predicted()
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits), targets[..., None], axis=-1
            )[..., 0]
            return -jnp.sum(chosen * weights) / jnp.sum(weights), (logits, aux)

        return jax.jit(jax.value_and_grad(run, has_aux=True))

    @functools.cached_property
    def computed(self):
        """Logits, aux, gradients."""
        (_, (logits, aux)), gradients = self.compute(self.params)
        return logits, aux, gradients


@pytest.fixture(scope="module", params=list(hub_models.CONFIGS))
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    theirs = hub_models.make(request.param)
    theirs.save_pretrained(root)
    source = from_hf.read(str(root))
    wanted = from_hf.Request(str(root), str(root / "run"), mesh=MESH)
    config = from_hf.config_of(source, wanted)
    config.model.remat = "none"
    parts = setup.make_parts(config)
    leaves = arrays(source, parts)
    params, router_state = jax.device_get(leaves)
    return Pair(
        name=request.param,
        theirs=theirs,
        folder=str(root),
        source=source,
        parts=parts,
        arrays=mapping.leaves_of(*leaves),
        config=config,
        params=params,
        router_state=router_state,
    )


def arrays(source, parts):
    """Parameters and router state, on the mesh."""
    abstract = parts.abstract
    leaves = mapping.leaves_of(abstract.all_params, abstract.router_state)
    wanted = mapping.places(source.family, parts.model, leaves)
    assert mapping.check(wanted, source.tensors, parts.model, source.ahead) == []
    found = load.arrays(wanted, source.tensors, leaves)
    empty = jax.tree.map(lambda leaf: None, abstract.router_state)
    return found["params"], found.get("router_state", empty)


def texts():
    """Tokens (2, 64), and which of them count."""
    tokens = np.random.default_rng(1).integers(0, 96, (len(FULL), LENGTH))
    return tokens, np.arange(LENGTH) < np.array(FULL)[:, None]


def inputs():
    tokens, held = texts()
    places = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    as_ints = lambda a: jnp.asarray(a, jnp.int32)
    return TokenInputs(
        tokens=as_ints(tokens), positions=as_ints(places), segments=as_ints(held)
    )


def predicted():
    """Next tokens (2, 64) and their weights."""
    tokens, held = texts()
    weights = held & np.roll(held, -1, axis=1) & (np.arange(LENGTH) < LENGTH - 1)
    return jnp.asarray(np.roll(tokens, -1, axis=1)), jnp.asarray(weights, jnp.float32)


def their_outputs(model, **options):
    tokens, held = texts()
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(held, dtype=torch.long),
            **options,
        )


def distance(ours, theirs):
    """Relative, in norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def nearest_tie(routing):
    """The smallest gap between the last score that is chosen and the first that is not.

    Where it is below the noise of float32, another expert may be chosen there.
    """
    held = np.asarray(routing.valid_t[0])
    experts = np.arange(routing.choice_te.shape[-1])
    chosen = (np.asarray(routing.expert_tk)[..., None] == experts).any(axis=-2)[:, held]
    scores = np.asarray(routing.choice_te)[:, held]
    last = np.where(chosen, scores, np.inf).min(axis=-1)
    first = np.where(chosen, -np.inf, scores).max(axis=-1)
    among = np.isfinite(last) & np.isfinite(first)  # What is masked ties with nothing.
    return float((last[among] - first[among]).min())


def test_logits_and_balance_loss(pair, record_property):
    options = {"output_router_logits": True} if pair.name in WITH_LOSS else {}
    theirs = their_outputs(pair.theirs, **options)
    logits, aux, _ = pair.computed
    held = texts()[1]
    found = distance(np.asarray(logits)[held], theirs.logits.numpy()[held])
    record_property("logits", found)
    assert found < 1e-5
    if aux is not None:
        record_property("nearest tie", nearest_tie(aux.routing))
    if pair.name in WITH_LOSS:
        weight = pair.config.model.feed_forward.balance.pooled_weight
        ours = float(aux.losses["pooled_balance_loss"]) / weight
        record_property("aux", abs(ours / float(theirs.aux_loss) - 1))
        assert ours == pytest.approx(float(theirs.aux_loss), rel=1e-6)


def test_experts_matter(pair):
    if not isinstance(pair.config.model.feed_forward, MoE):
        pytest.skip("dense")
    without = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * ("experts" not in jax.tree_util.keystr(path)),
        pair.params,
    )
    (_, (logits, _)), _ = pair.compute(without)
    assert distance(logits, pair.computed[0]) > 0.1


def test_greedy_text_is_the_same(pair):
    prompt = texts()[0][:, :16]
    theirs = pair.theirs.generate(
        input_ids=torch.tensor(prompt),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    ours = generate.generate(
        DecoderModel(pair.config.model),
        pair.params,
        pair.router_state,
        prompt.tolist(),
        max_new_tokens=NEW,
        sampling=generate.Sampling(temperature=0),
    )
    assert theirs.shape == (2, 16 + NEW)
    assert theirs.tolist() == ours


def their_gradients(pair, folder):
    """Of the mean loss, as files of the hub, read like weights."""
    tokens, held = texts()
    model = copy.deepcopy(pair.theirs)
    labels = torch.tensor(np.where(held, tokens, -100))
    model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(held, dtype=torch.long),
        labels=labels,
    ).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter)
                if parameter.grad is None
                else parameter.grad
            )
    model.save_pretrained(folder)
    source = from_hf.read(str(folder))
    where = jax.sharding.NamedSharding(
        jax.sharding.Mesh(jax.devices()[:1], "x"), jax.sharding.PartitionSpec()
    )
    leaves = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        mapping.leaves_of(pair.params, pair.router_state),
    )
    wanted = mapping.places(source.family, DecoderModel(pair.config.model), leaves)
    return load.arrays(wanted, source.tensors, leaves)["params"]


def test_gradients(pair, tmp_path, record_property):
    ours = pair.computed[2]
    theirs = their_gradients(pair, tmp_path)
    worst = {}
    flat = jax.tree_util.tree_flatten_with_path(theirs)[0]
    for (path, expected), found in zip(flat, jax.tree.leaves(ours), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.linalg.norm(expected) > 0, name
        worst[name] = distance(found, expected)
    record_property("gradients", max(worst.values()))
    assert {name: d for name, d in worst.items() if d > 1e-4} == {}


def test_round_trip_has_the_same_bytes(pair, tmp_path):
    family = to_hf.choose(pair.config.model, "")
    assert family is pair.source.family
    to_hf.write(str(tmp_path / "out"), family, pair.parts, pair.arrays, kept="")
    before = tensor_file.read_header(f"{pair.folder}/model.safetensors")
    after = tensor_file.read_header(str(tmp_path / "out" / "model.safetensors"))
    assert before.keys() == after.keys()
    for name, entry in before.items():
        assert entry.type_name == after[name].type_name
        assert entry.array().tobytes() == after[name].array().tobytes(), name
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(back) is type(pair.theirs)
    same = lambda model: their_outputs(model).logits.numpy()
    np.testing.assert_array_equal(same(back.eval()), same(pair.theirs))


def test_another_mesh_holds_the_same(pair):
    config = copy.deepcopy(pair.config)
    config.mesh = MeshConfig(data=8)
    parts = setup.make_parts(config)
    found = mapping.leaves_of(*arrays(pair.source, parts))
    assert found.keys() == pair.arrays.keys()
    for name, leaf in pair.arrays.items():
        assert found[name].sharding.is_fully_replicated
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
