"""DeepSeek-V3's module that predicts one token further, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")
import hub_models
import safetensors.torch
import torch
from transformers.modeling_layers import MtpModel

from moe_jax.config import MeshConfig
from moe_jax.convert import from_hf, load, mapping
from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.moe.routing import EVAL
from moe_jax.nn import cross_entropy
from moe_jax.objectives.next_token import NextToken
from moe_jax.train import setup

pytestmark = pytest.mark.slow
LENGTH = 48


def module_tensors(ahead, layer):
    """What the module is in files of the hub, where it is one more layer."""
    found = {}
    for name, tensor in ahead.layers[0].state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        name = f"model.layers.{layer}.{name}"
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, w in zip(("gate", "up"), both.chunk(2), strict=True):
                    found[name.replace("gate_up_proj", f"{e}.{part}_proj.weight")] = w
        elif name.endswith("experts.down_proj"):
            for e, w in enumerate(tensor):
                found[name.replace("down_proj", f"{e}.down_proj.weight")] = w
        else:
            found[name] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The model, its module, and the folder of both."""
    model = hub_models.make("deepseek_v3", num_nextn_predict_layers=1)
    torch.manual_seed(3)
    ahead = MtpModel(model, 1).eval()
    with torch.no_grad():
        for name, tensor in ahead.layers[0].state_dict().items():
            norm = "norm" in name or name.startswith(("enorm", "hnorm"))
            size = torch.rand_like(tensor) + 0.5 if norm else torch.randn_like(tensor)
            tensor.copy_(size if norm else 0.2 * size)
    root = tmp_path_factory.mktemp("ahead")
    model.save_pretrained(root)
    path = root / "model.safetensors"
    layer = model.config.num_hidden_layers
    tensors = safetensors.torch.load_file(path) | module_tensors(ahead, layer)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return model, ahead, str(root)


def test_logits_one_token_further(theirs):
    model, ahead, folder = theirs
    tokens = np.random.default_rng(2).integers(0, 96, (1, LENGTH))
    with torch.no_grad():
        given = torch.tensor(tokens)
        hidden = model.model(input_ids=given).last_hidden_state
        places = torch.arange(1, LENGTH)[None]
        found = ahead.forward_layer(
            0, hidden[:, :-1], places, None, input_ids=given[:, 1:]
        )
        want = model.lm_head(found).numpy()

    source = from_hf.read(folder)
    request = from_hf.Request(folder, folder + "/run", mesh=MeshConfig(data=1))
    config = from_hf.config_of(source, request)
    config.model.mtp, config.objective = 1, NextToken(mtp_weight=0.3)
    config.model.remat = "none"
    parts = setup.make_parts(config, jax.devices()[:1])
    abstract = parts.abstract
    leaves = mapping.leaves_of(abstract.all_params, abstract.router_state)
    wanted = mapping.places(source.family, parts.model, leaves)
    assert mapping.check(wanted, source.tensors, parts.model, source.ahead) == []
    arrays = load.arrays(wanted, source.tensors, leaves)
    params, state = arrays["params"], arrays["router_state"]
    shape = tokens.shape
    inputs = TokenInputs(
        tokens=jnp.asarray(tokens, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), shape),
        segments=jnp.ones(shape, jnp.int32),
    )
    decoder = DecoderModel(config.model)

    @jax.jit
    def run(params):
        hidden, _, _ = decoder.apply(params, state, inputs, key=None, mode=EVAL)
        output = decoder.output(params, hidden)
        (normed,), _, _ = decoder.ahead(
            params, state, inputs, output.hidden, key=None, mode=EVAL
        )
        return cross_entropy.logits(*output._replace(hidden=normed))

    ours = np.asarray(run(params))[:, : LENGTH - 1]
    assert np.linalg.norm(ours - want) / np.linalg.norm(want) < 1e-5
