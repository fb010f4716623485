"""Models in the formats of others, changed: converted, or one clear message."""

import importlib
import json
import shutil

import hypothesis
import mutations
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.convert import folder, from_hf, pt_file, tensor_file
from moe_jax.data.tokenizers import HuggingFaceTokenizer, make_tokenizer

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
}
DEEPSEEK = CONFIG | {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}
GPT_OSS = CONFIG | {
    "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "head_dim": 4,
    "swiglu_limit": 7.0,
}
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.int64),
    "c.weight": np.ones((4, 4), np.uint8),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that is alone in its own: nothing may appear beside it."""
    made = tmp_path_factory.mktemp("converters") / "inside"
    made.mkdir()
    yield made
    assert [p.name for p in made.parent.iterdir()] == ["inside"]


def _file_of(place):
    path = place / "base.safetensors"
    tensor_file.save(str(path), TENSORS)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content


@st.composite
def tensor_files(draw, header, content):
    if draw(st.booleans()):
        return draw(mutations.byte_strings(content))
    text = draw(mutations.json_files(header))
    length = draw(st.sampled_from([len(text)] * 8 + [0, 2**63, len(text) + 1, 2**40]))
    body = content[8 + int.from_bytes(content[:8], "little") :]
    return length.to_bytes(8, "little") + text + body


@mutations.settings(60)
@hypothesis.given(data=st.data())
def test_tensor_files(data, place, clear):
    path = place / "model.safetensors"
    path.write_bytes(data.draw(tensor_files(*_file_of(place))))
    found = clear(lambda: tensor_file.read_header(str(path)))
    for stored in (found or {}).values():
        assert stored.array().nbytes <= path.stat().st_size


@mutations.settings(40)
@hypothesis.given(
    text=mutations.json_files(
        {
            "metadata": {"total_size": 104},
            "weight_map": {"a.weight": "one.safetensors", "b": "two.safetensors"},
        }
    )
)
def test_indices(text, place, clear):
    made = place / "indexed"
    made.mkdir(exist_ok=True)
    for name, keys in (("one", ["a.weight"]), ("two", ["b"])):
        parts = {key: TENSORS[key] for key in keys}
        tensor_file.save(str(made / f"{name}.safetensors"), parts)
    (made / folder.INDEX).write_bytes(text)
    found = clear(lambda: folder.read_tensors(str(made), {}))
    assert found is None or set(found) <= set(TENSORS)


@mutations.settings(80)
@hypothesis.given(
    text=st.sampled_from([CONFIG, DEEPSEEK, GPT_OSS]).flatmap(mutations.json_files)
)
def test_model_configs(text, place, clear):
    made = place / "model"
    made.mkdir(exist_ok=True)
    tensor_file.save(str(made / folder.SINGLE), TENSORS)
    (made / folder.CONFIG).write_bytes(text)
    request = from_hf.Request(checkpoint=str(made), workdir=str(place / "run"))

    def convert():
        return from_hf.config_of(from_hf.read(str(made)), request)

    clear(convert)


TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 3,
            "content": "</s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "a"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"a": 0, "b": 1, "[UNK]": 2},
        "unk_token": "[UNK]",
    },
}


@mutations.settings(40)
@hypothesis.given(text=mutations.json_files(TOKENIZER))
def test_tokenizers(text, place, clear):
    pytest.importorskip("tokenizers")
    path = place / "tokenizer.json"
    path.write_bytes(text)
    config = HuggingFaceTokenizer(path=str(path), eos="</s>")
    made = clear(lambda: make_tokenizer(config))
    if made is not None:
        ids = clear(lambda: made.encode(b"a b </s>"))
        if ids is not None:
            clear(lambda: made.decode(ids))


class Evil:
    """What a pickle of an attacker looks like."""

    def __reduce__(self):
        return (importlib.import_module, ("this_module_must_not_be_imported",))


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory):
    torch = pytest.importorskip("torch")
    made = tmp_path_factory.mktemp("torch")
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    found = []
    for new in (True, False):
        path = made / f"{new}.pt"
        torch.save({"ema": tensors}, path, _use_new_zipfile_serialization=new)
        found.append(path.read_bytes())
    path = made / "evil.pt"
    torch.save({"ema": tensors | {"evil": Evil()}}, path)
    return [*found, path.read_bytes()]


@mutations.settings(30)
@hypothesis.given(data=st.data())
def test_torch_files(data, place, clear, torch_files):
    base = data.draw(st.sampled_from(torch_files))
    path, out = place / "model.pt", place / "out.safetensors"
    path.write_bytes(data.draw(mutations.byte_strings(base)))
    out.unlink(missing_ok=True)
    say = lambda line: None
    clear(lambda: pt_file.convert(str(path), str(out), key="ema", say=say))
    if out.exists():
        tensor_file.read_header(str(out))


def test_a_pickle_that_imports_is_refused(place, clear, torch_files):
    path = place / "evil.pt"
    path.write_bytes(torch_files[-1])
    with pytest.raises(pt_file.UserError, match="neither tensor nor plain value"):
        pt_file.convert(str(path), str(place / "evil.safetensors"), key="ema")
    shutil.rmtree(place / "none", ignore_errors=True)
