"""A small corpus in place of the standard library, and configs that use it."""

import random
import sysconfig

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.data import sources, tokenizers
from moe_jax.data.images.config import ImageDataConfig


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A folder that the interpreter takes for its standard library."""
    root = tmp_path / "stdlib"
    rng = random.Random(0)
    for number in range(30):
        path = root / ("package" if number % 3 else ".") / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = rng.choices(["def", "return", "x", "é", "\n"], k=rng.randrange(1, 80))
        path.write_text(" ".join(words))
    get_path = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda n: str(root) if n == "stdlib" else get_path(n)
    )
    return root


@pytest.fixture
def corpus(tmp_path):
    """A folder of text files, one of them empty."""
    root = tmp_path / "corpus"
    root.mkdir()
    rng = random.Random(1)
    for number in range(25):
        text = bytes(rng.choices(b"abcdefgh \n", k=rng.randrange(1, 120)))
        (root / f"{number:02}.txt").write_bytes(text)
    (root / "empty.txt").write_bytes(b"")
    return root


@pytest.fixture
def make_config(tmp_path):
    """A config whose data comes from `source`; other fields of DataConfig follow."""

    def make(source, **fields):
        fields = {
            "tokenizer": tokenizers.Bytes(),
            "sequence_length": 16,
            "folder": str(tmp_path / "cache"),
            "validation_fraction": 0.2,
            **fields,
        }
        return config_lib.Config(data=config_lib.DataConfig(source=source, **fields))

    return make


@pytest.fixture
def corpus_config(corpus, make_config):
    return make_config(sources.TextFiles(path=str(corpus)))


@pytest.fixture
def tokenizer_file(tmp_path):
    """A small byte-level BPE with <s> and </s>, as Hugging Face saves it."""
    hf = pytest.importorskip("tokenizers")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["abab cdcd abab"] * 9, trainer)
    tokenizer.enable_truncation(4)  # as many published files do
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def make_images(tmp_path):
    """A config whose images come from `source`; other fields of ImageDataConfig too."""

    def make(source, **fields):
        fields = {
            "folder": str(tmp_path / "cache"),
            "validation_fraction": 0.2,
            "workers": 2,
            **fields,
        }
        return config_lib.Config(data=ImageDataConfig(source=source, **fields))

    return make


@pytest.fixture
def image_arrays():
    """Sixty random images (60, 5, 6, 3), labels of three classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 5, 6, 3), dtype=np.uint8)
    return images, rng.permutation(np.arange(60) % 3)


@pytest.fixture
def npz_file(tmp_path, image_arrays):
    path = tmp_path / "images.npz"
    np.savez(path, images=image_arrays[0], labels=image_arrays[1])
    return path
