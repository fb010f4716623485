"""What each source gives, and what it says where there is nothing to give."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.data import documents, sources
from moe_jax.errors import UserError


def splits(config):
    loaded = sources.load(config.data)
    return [list(loaded.split(name)) for name in documents.SPLITS]


def test_python_source_gives_every_module_once(stdlib, make_config):
    for left_out in ("test/a.py", "package/tests/a.py", "site-packages/a.py"):
        path = stdlib / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left out")
    (stdlib / "test_it.py").write_text("left out")
    (stdlib / "data.txt").write_text("left out")
    (stdlib / "empty.py").write_text("")
    train, validation = splits(make_config(sources.PythonSource()))
    found = {str(path.relative_to(stdlib)) for path in stdlib.rglob("module_*.py")}
    assert train and validation
    assert sorted(name for name, _ in train + validation) == sorted(found)
    for name, text in train + validation:
        assert text == (stdlib / name).read_bytes()


def test_python_source_follows_text_and_fraction(stdlib, make_config):
    config = make_config(sources.PythonSource())
    before = splits(config)
    assert splits(config) == before
    (stdlib / "module_new.py").write_text("new")
    train, validation = splits(config)
    assert ("module_new.py", b"new") in train + validation
    assert set(before[0]) < {*train, *validation}
    config.data.validation_fraction = 0.0
    train, validation = splits(config)
    assert len(train) == 31 and not validation


def test_text_files_hold_out_whole_documents(corpus, corpus_config):
    (corpus / ".hidden").write_text("hidden")
    (corpus / "sub").mkdir()
    (corpus / "sub" / "deep").write_bytes(b"\xff\x00")
    train, validation = splits(corpus_config)
    assert train == sorted(train) and validation == sorted(validation)
    want = {
        p.relative_to(corpus).as_posix(): p.read_bytes()
        for p in corpus.rglob("*")
        if p.is_file() and p.stat().st_size and p.name != ".hidden"
    }
    assert dict(train + validation) == want
    assert len(train) + len(validation) == len(want)


def test_text_files_glob(corpus, make_config):
    train, validation = splits(make_config(sources.TextFiles(path=f"{corpus}/0*.txt")))
    assert len(train + validation) == 10


@pytest.mark.parametrize("text", ["line\n" * 50, "é" * 200, "x" * 99 + "\n"])
def test_single_file_holds_out_its_end(tmp_path, make_config, text):
    path = tmp_path / "one.txt"
    path.write_text(text)
    ((_, head),), ((_, end),) = splits(make_config(sources.TextFiles(path=str(path))))
    assert (head + end).decode() == text
    head.decode()  # no character is cut in two
    size = len(text.encode())
    assert 0.2 * size - 3 <= len(end) <= 0.2 * size + 6
    if "\n" in text[:-1]:
        assert head.endswith(b"\n")


def test_single_file_without_validation(tmp_path, make_config):
    path = tmp_path / "one.txt"
    path.write_text("text")
    config = make_config(sources.TextFiles(path=str(path)), validation_fraction=0.0)
    assert splits(config) == [[("one.txt", b"text")], []]


def test_text_files_identity_follows_content(corpus, corpus_config):
    before = sources.load(corpus_config.data).identity
    assert sources.load(corpus_config.data).identity == before
    path = corpus / "00.txt"
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))  # of equal size
    assert sources.load(corpus_config.data).identity != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "does not exist"),
        ("folder", "holds no files"),
        ("*.none", "matches no file"),
        ("empty", "every file there is empty"),
    ],
)
def test_text_files_errors(tmp_path, make_config, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        sources.load(make_config(sources.TextFiles(path=path)).data)
    assert path in str(error.value)


def test_held_out_is_stable_and_never_one_sided():
    names = [str(i) for i in range(1000)]
    chosen = documents.held_out(names, 0.2)
    assert 150 < chosen.sum() < 250
    np.testing.assert_array_equal(documents.held_out(names[:500], 0.2), chosen[:500])
    for fraction in (1e-9, 1 - 1e-9):
        assert 0 < documents.held_out(names[:2], fraction).sum() < 2
    assert not documents.held_out(names, 0.0).any()


@pytest.fixture
def tfds_source(stdlib, make_config, tmp_path):
    """A dataset whose code is gone, prepared as array_record, and what it holds."""
    want = splits(make_config(sources.PythonSource()))
    (prepared,) = (tmp_path / "cache" / "tfds").glob("*/python_source/1.0.0")
    folder = tmp_path / "datasets" / "some_text" / "1.0.0"
    folder.mkdir(parents=True)
    for path in prepared.iterdir():
        name = path.name.replace("python_source", "some_text")
        (folder / name).write_bytes(path.read_bytes())
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("python_source", "some_text"))
    return sources.TfdsText(name="some_text", data_dir=str(tmp_path / "datasets")), want


def test_tfds_reads_array_record_without_tensorflow(tfds_source, make_config):
    source, want = tfds_source
    train, validation = splits(make_config(source, validation_fraction=0.0))
    assert [text for _, text in train] == [text for _, text in want[0]]
    assert [text for _, text in validation] == [text for _, text in want[1]]
    assert "tensorflow" not in sys.modules


def test_tfds_holds_out_of_training_split(tfds_source, make_config):
    source, want = tfds_source
    source = dataclasses.replace(source, validation_split="")
    train, validation = splits(make_config(source))
    assert train and validation
    assert sorted(t for _, t in train + validation) == sorted(t for _, t in want[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "no_text"}, "no such dataset"),
        ({"name": "mnist"}, "not prepared .*tfds build mnist"),
        ({"name": "some_text:7.0.0"}, "cannot open it|no such dataset"),
        ({"feature": "txt"}, "did you mean 'text'"),
        ({"train_split": "trian"}, "did you mean 'train'"),
        ({"validation_split": "test"}, r"has the splits \['train', 'validation'\]"),
    ],
)
def test_tfds_errors(tfds_source, make_config, fields, message):
    source = dataclasses.replace(tfds_source[0], **fields)
    with pytest.raises(UserError, match=message):
        sources.load(make_config(source, validation_fraction=0.0).data)


def test_tfds_tfrecord_needs_tensorflow(
    tfds_source, make_config, tmp_path, monkeypatch
):
    (info,) = (tmp_path / "datasets").rglob("dataset_info.json")
    content = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[tf\]'"):
        sources.load(make_config(tfds_source[0], validation_fraction=0.0).data)


def test_tfds_split_of_its_own_excludes_fraction(make_config):
    config = make_config(sources.TfdsText())
    source = config.data.source
    (problem,) = source.problems("config.data.source", config)
    assert problem.startswith("config.data.validation_fraction=0.2: must be 0")
    config.data.validation_fraction = 0.0
    assert not list(source.problems("config.data.source", config))


def test_every_source_is_registered():
    # By name: the classes that `slots=True` replaced may be listed, too.
    known = {cls.__qualname__ for cls in config_lib.SourceConfig.__subclasses__()}
    given = {*sources.SOURCES, sources.Mixture}
    assert {cls.__qualname__ for cls in given} == known
