"""Both tokenizers: ids, bytes back, and messages."""

import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.data import tokenizers
from moe_jax.errors import UserError


def make_hf(path, **fields):
    config = tokenizers.HuggingFaceTokenizer(path=str(path), **fields)
    return tokenizers.make_tokenizer(config)


@hypothesis.given(st.binary())
@hypothesis.settings(deadline=None)
def test_bytes_round_trip(text):
    tokenizer = tokenizers.make_tokenizer(tokenizers.Bytes())
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text)
    with_specials = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(with_specials) == text
    assert tokenizer.vocab_size == 258


def test_hf_round_trip(tokenizer_file):
    tokenizer = make_hf(tokenizer_file, bos="<s>", eos="</s>")
    text = "abab cdcd é <s> and much more than four tokens".encode()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) > 4, "the file's truncation must not apply"
    assert tokenizer.bos_id not in ids, "text that spells a special token is text"
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_hf_describes_content(tokenizer_file):
    before = make_hf(tokenizer_file).describe()
    assert before["bos_id"] is None
    assert make_hf(tokenizer_file, bos="<s>").describe() != before
    tokenizer_file.write_text(tokenizer_file.read_text() + "\n")
    assert make_hf(tokenizer_file).describe()["sha256"] != before["sha256"]


def test_hf_not_utf8_names_document_and_byte(tokenizer_file):
    with pytest.raises(UserError, match=r"'a\.txt' is not UTF-8 at byte 103 \(0xff\)"):
        make_hf(tokenizer_file).encode(b"abc\xff", "a.txt", 100)


def test_hf_unknown_special_offers_nearest(tokenizer_file):
    with pytest.raises(UserError, match=r"bos='<S>' is not in .*did you mean '<s>'"):
        make_hf(tokenizer_file, bos="<S>")


def test_hf_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read it"):
        make_hf(tmp_path / "none.json")


def test_hf_damaged_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        make_hf(path)


def test_hf_missing_package(tokenizer_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[hf\]'"):
        make_hf(tokenizer_file)
