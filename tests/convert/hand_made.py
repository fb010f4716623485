"""A tiny Mixtral as files, names and shapes written out; no torch."""

import json

import numpy as np

from moe_jax.convert import tensor_file

LAYERS, EXPERTS = 2, 8
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 7,
}


def shapes():
    """Name to shape of all tensors."""
    found = {
        "model.embed_tokens.weight": (264, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (264, 16),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}input_layernorm.weight": (16,),
            f"{at}post_attention_layernorm.weight": (16,),
            f"{at}self_attn.q_proj.weight": (16, 16),
            f"{at}self_attn.k_proj.weight": (8, 16),
            f"{at}self_attn.v_proj.weight": (8, 16),
            f"{at}self_attn.o_proj.weight": (16, 16),
            f"{at}block_sparse_moe.gate.weight": (EXPERTS, 16),
        }
        for e in range(EXPERTS):
            expert = f"{at}block_sparse_moe.experts.{e}."
            found |= {
                f"{expert}w1.weight": (24, 16),
                f"{expert}w2.weight": (16, 24),
                f"{expert}w3.weight": (24, 16),
            }
    return found


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        name: (0.2 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in shapes().items()
    }


def write(folder, found, files=1, **config):
    """Writes config.json, and tensors in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if files == 1:
        tensor_file.save(str(folder / "model.safetensors"), found)
        return
    names, weight_map = list(found), {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {name: found[name] for name in names[i::files]}
        tensor_file.save(str(folder / file), part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read(folder):
    """All tensors of a folder of one file, by name."""
    header = tensor_file.read_header(str(folder / "model.safetensors"))
    return {name: np.array(entry.array()) for name, entry in header.items()}
