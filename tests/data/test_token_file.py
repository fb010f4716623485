"""Token files: content, the cache, damage, full disks, kills, and the pool."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from moe_jax import config_json
from moe_jax.data import (
    documents,
    pipeline,
    prepared,
    sources,
    token_file,
    tokenizers,
    workers,
)
from moe_jax.errors import UserError


def names_in_cache(config):
    root = os.path.join(config.data.folder, "tokens")
    return sorted(name for name in os.listdir(root) if not name.endswith(".lock"))


def only_folder(config):
    (name,) = names_in_cache(config)
    return token_file.Path(config.data.folder, "tokens", name)


def tokens_of(config, split="train"):
    return token_file.read(only_folder(config))[1][split].tokens


def slow_tokens(config, split):
    """Begin, tokens and end of every document, in plain Python."""
    tokenizer = tokenizers.make_tokenizer(config.data.tokenizer)
    tokens, offsets = [], [0]
    for _, text in sources.load(config.data).split(split):
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        tokens += begin + tokenizer.encode(text).tolist() + end
        offsets.append(len(tokens))
    return tokens, offsets


def assert_matches_source(config):
    manifest, files = token_file.read(only_folder(config))
    for split in documents.SPLITS:
        tokens, offsets = slow_tokens(config, split)
        np.testing.assert_array_equal(files[split].tokens, tokens)
        np.testing.assert_array_equal(files[split].offsets, offsets)
        texts = [text for _, text in sources.load(config.data).split(split)]
        entry = manifest["splits"][split]
        counts = [entry[name] for name in ("documents", "tokens", "bytes")]
        assert counts == [len(texts), len(tokens), sum(map(len, texts))]


def test_holds_every_document(corpus_config):
    pipeline.prepare(corpus_config)
    assert_matches_source(corpus_config)
    assert tokens_of(corpus_config).dtype == np.uint16


@pytest.mark.parametrize("fields", [{}, {"eos": "</s>"}, {"bos": "<s>", "eos": "</s>"}])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_hugging_face_in_processes(
    corpus_config, tokenizer_file, monkeypatch, fields, num_workers
):
    monkeypatch.setattr(token_file, "_CHUNK_BYTES", 300)  # several chunks
    config = corpus_config
    config.data.workers = num_workers
    config.data.tokenizer = tokenizers.HuggingFaceTokenizer(
        path=str(tokenizer_file), **fields
    )
    started = []
    start = workers.Pool.__init__
    monkeypatch.setattr(
        workers.Pool, "__init__", lambda *a: (started.append(1), start(*a))[1]
    )
    pipeline.prepare(config)
    assert_matches_source(config)
    assert bool(started) == (num_workers > 1)


def test_pool_reports_bad_text(corpus, corpus_config, tokenizer_file, monkeypatch):
    monkeypatch.setattr(token_file, "_CHUNK_BYTES", 100)
    (corpus / "bad.txt").write_bytes(b"abc\xff")
    config = corpus_config
    config.data.workers = 2
    config.data.validation_fraction = 0.0
    config.data.tokenizer = tokenizers.HuggingFaceTokenizer(path=str(tokenizer_file))
    with pytest.raises(UserError, match=r"'bad\.txt' is not UTF-8 at byte 3"):
        pipeline.prepare(config)
    assert names_in_cache(config) == []


def test_dead_worker_is_reported(tokenizer_file):
    config = tokenizers.HuggingFaceTokenizer(path=str(tokenizer_file))
    chunk = [workers.Piece("a", b"text", 0, True)]
    with workers.Pool(config, 1) as pool:
        assert next(pool.map([chunk])).num_bytes == 4
        pool._processes[0].kill()
        with pytest.raises(UserError, match="process ended with status -9"):
            list(pool.map([chunk]))


def test_long_documents_are_cut_and_joined(corpus_config, monkeypatch):
    monkeypatch.setattr(token_file, "_PIECE_BYTES", 7)
    monkeypatch.setattr(token_file, "_CHUNK_BYTES", 20)
    pipeline.prepare(corpus_config)
    assert_matches_source(corpus_config)


def test_pieces_keep_lines_and_characters_whole(monkeypatch):
    monkeypatch.setattr(token_file, "_PIECE_BYTES", 5)
    text = "ab\ncdéé\né€€x".encode()
    pieces = list(token_file._pieces([("a", text)]))
    assert b"".join(piece.text for piece in pieces) == text
    assert pieces[0].text == b"ab\n"
    for piece in pieces:
        piece.text.decode()
        assert text[piece.offset :].startswith(piece.text)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_second_call_reuses(corpus_config, monkeypatch):
    first = pipeline.prepare(corpus_config)
    monkeypatch.setattr(prepared, "_build", None)  # calling it would fail
    second = pipeline.prepare(corpus_config)
    assert second.content_hash == first.content_hash
    assert second.parts[0].manifest == first.parts[0].manifest


def test_reuses_a_folder_without_lock(corpus_config, monkeypatch):
    pipeline.prepare(corpus_config)
    monkeypatch.setattr(prepared.folders, "exclusive", None)
    pipeline.prepare(corpus_config)


def test_changed_text_is_tokenized_again(corpus, corpus_config):
    before = pipeline.prepare(corpus_config)
    (corpus / "00.txt").write_bytes(b"changed")
    after = pipeline.prepare(corpus_config)
    assert after.content_hash != before.content_hash
    assert len(names_in_cache(corpus_config)) == 2


def damage_cut(folder):
    path = folder / "train.tokens"
    path.write_bytes(path.read_bytes()[:-2])


def damage_gone(folder):
    (folder / "validation.offsets.npy").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_path(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("train.tokens", "../x/train.tokens"))


def damage_version(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_gone,
        damage_manifest,
        damage_no_manifest,
        damage_path,
        damage_version,
    ],
)
def test_damage_is_mended_with_a_warning(corpus_config, caplog, damage):
    want = pipeline.prepare(corpus_config).parts[0].manifest
    damage(only_folder(corpus_config))
    with caplog.at_level(logging.WARNING):
        assert pipeline.prepare(corpus_config).parts[0].manifest == want
    assert "is damaged" in caplog.text
    assert_matches_source(corpus_config)


@pytest.mark.parametrize("name", ["../train.tokens", "/etc/passwd", "", ".", ".."])
def test_manifest_names_stay_in_the_folder(corpus_config, name):
    pipeline.prepare(corpus_config)
    folder = only_folder(corpus_config)
    with pytest.raises(prepared.DamagedError, match="file name"):
        prepared.checked(folder, {"name": name, "size_bytes": 0})


def test_full_disk(corpus_config, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepared, "_flush", full)
    with pytest.raises(UserError, match=r"no space left in '.*' \(\d+ bytes free "):
        pipeline.prepare(corpus_config)
    assert names_in_cache(corpus_config) == []
    monkeypatch.undo()
    pipeline.prepare(corpus_config)
    assert_matches_source(corpus_config)


def test_folder_that_cannot_be_made(corpus_config, tmp_path):
    (tmp_path / "file").touch()
    corpus_config.data.folder = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"cannot create .*Not a directory"):
        pipeline.prepare(corpus_config)


def test_folder_below_home(corpus_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    corpus_config.data.folder = "~/below"
    pipeline.prepare(corpus_config)
    assert (tmp_path / "below" / "tokens").is_dir()


_CHILD = """
import os, signal, sys, time
from moe_jax import config_json
from moe_jax.data import pipeline, token_file

mode = sys.argv[2]
write = token_file._write_split

def planted(folder, name, *rest):
    if mode == "slow":
        time.sleep(0.3)
        print("works", flush=True)
    if mode == "kill between splits" and name == "validation":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, name, *rest)

token_file._write_split = planted
if mode == "kill before rename":
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
config = config_json.from_json(open(sys.argv[1]).read())
print(pipeline.prepare(config).content_hash)
"""


def start_child(config, tmp_path, mode):
    path = tmp_path / "config.json"
    path.write_text(config_json.to_json(config))
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(path), mode],
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
    )


@pytest.mark.parametrize("mode", ["kill between splits", "kill before rename"])
def test_kill_leaves_earlier_state_and_is_cleaned(
    corpus, corpus_config, tmp_path, mode
):
    before = pipeline.prepare(corpus_config).content_hash
    kept = only_folder(corpus_config)
    old = (corpus / "00.txt").read_bytes()
    (corpus / "00.txt").write_bytes(b"changed")
    child = start_child(corpus_config, tmp_path, mode)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    left = [name for name in names_in_cache(corpus_config) if ".tmp-" in name]
    assert left and set(names_in_cache(corpus_config)) == {kept.name, *left}
    token_file.read(kept)
    # The next call with the same text cleans up and ends what was begun.
    after = pipeline.prepare(corpus_config).content_hash
    assert after != before
    assert not [name for name in names_in_cache(corpus_config) if ".tmp-" in name]
    (corpus / "00.txt").write_bytes(old)
    assert pipeline.prepare(corpus_config).content_hash == before


@pytest.mark.multiprocess
def test_of_several_processes_one_works(corpus_config, tmp_path):
    children = [start_child(corpus_config, tmp_path, "slow") for _ in range(3)]
    lines = [child.communicate()[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    # One line for each split from the one that tokenises, none from the others.
    assert sorted(len(words) for words in lines) == [1, 1, 3]
    want = pipeline.prepare(corpus_config).content_hash
    assert [words[-1] for words in lines] == [want] * 3
    only_folder(corpus_config)


def test_wide_vocabulary_takes_more_bytes():
    assert workers.token_dtype(2**16) == np.uint16
    assert workers.token_dtype(2**16 + 1) == np.uint32
