"""train/data/tokens.py: token files, the cache that keeps them, what is held out."""

import json

import numpy as np
import pytest

from train.data import sources
from train.data import tokens as tokens_lib
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.tokens import prepare_tokens


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i:02}: " + f"the number {i * i} is a square. " * 20)
    return folder


def prepare(corpus, tmp_path, **changes):
    return prepare_tokens(str(corpus), **{"vocab_size": 300, "cache_dir": str(tmp_path / "cache"), **changes})


def decode(data, split):
    tokenizer = load_tokenizer(data.tokenizer_file)
    return tokenizer.decode(getattr(data, split).tolist(), skip_special_tokens=False).split("<|endoftext|>")


def test_documents_are_joined_by_the_end_of_text_token(corpus, tmp_path):
    data = prepare(corpus, tmp_path)
    texts = {file.read_text() for file in corpus.iterdir()}
    train, held_out = decode(data, "train")[:-1], decode(data, "validation")[:-1]

    assert set(train) | set(held_out) == texts
    assert len(train) + len(held_out) == 40
    assert train == sorted(train)  # in the order of the files
    assert 0 < len(held_out) < 10
    assert data.train.dtype == np.uint16
    assert data.manifest["documents"] == 40
    assert data.manifest["train_tokens"] == len(data.train)
    assert data.train[-1] == data.manifest["end_of_text_id"] == 0


def test_what_is_held_out_follows_from_the_text_alone(corpus, tmp_path):
    before = set(decode(prepare(corpus, tmp_path), "validation"))
    for file in corpus.iterdir():
        file.rename(corpus / f"renamed-{file.name}")
    (corpus / "another.txt").write_text("one more document " * 20)

    after = set(decode(prepare(corpus, tmp_path), "validation"))

    assert before - {""} <= after


def test_one_long_document_is_held_out_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 200)
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i}\n" for i in range(400)))

    data = prepare(file, tmp_path, validation_fraction=1e-6)

    assert len(data.validation) > 0
    assert (data.train == 0).sum() + (data.validation == 0).sum() == 1


def test_no_fraction_holds_nothing_out(corpus, tmp_path):
    assert len(prepare(corpus, tmp_path, validation_fraction=0.0).validation) == 0


def test_second_call_reads_the_cache(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, tmp_path)
    monkeypatch.setattr(tokens_lib, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(tokens_lib, "_write_tokens", lambda *_: pytest.fail("tokenised again"))
    second = prepare(corpus, tmp_path)

    assert (first.built, second.built) == (True, False)
    np.testing.assert_array_equal(first.train, second.train)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


@pytest.mark.parametrize("damage", ["train.npy", "manifest.json"])
def test_a_damaged_cache_is_made_anew(corpus, tmp_path, damage):
    first = prepare(corpus, tmp_path)
    kept = first.train.copy()
    file = first.folder / damage
    file.write_bytes(file.read_bytes()[:150])

    second = prepare(corpus, tmp_path)

    assert second.built
    np.testing.assert_array_equal(second.train, kept)


def test_an_edit_of_the_text_is_seen(corpus, tmp_path):
    first = prepare(corpus, tmp_path)
    (corpus / "00.txt").write_text("changed")
    second = prepare(corpus, tmp_path)

    assert second.built
    assert second.manifest["fingerprint"] != first.manifest["fingerprint"]


def test_the_fingerprint_does_not_depend_on_the_place(corpus, tmp_path):
    first = prepare(corpus, tmp_path)
    second = prepare(corpus.rename(tmp_path / "moved"), tmp_path)

    assert second.folder != first.folder
    assert second.manifest["fingerprint"] == first.manifest["fingerprint"]


def test_an_interruption_leaves_nothing(corpus, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens_lib, "_write_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path)

    assert list((tmp_path / "cache").iterdir()) == []
    assert prepare(corpus, tmp_path).built


def test_special_tokens_in_the_text_are_text(tmp_path):
    file = tmp_path / "doc.txt"
    file.write_text("before <|endoftext|> after " * 20)

    data = prepare(file, tmp_path, validation_fraction=0.0)

    assert (data.train == 0).sum() == 1


def test_a_given_tokenizer_is_used(corpus, tmp_path):
    trained = train_tokenizer(["abc abc abc document square number"], 270)
    trained.save(str(tmp_path / "tokenizer.json"))

    data = prepare(corpus, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=None)

    assert json.loads(data.tokenizer_file.read_text()) == json.loads(trained.to_str())
    with pytest.raises(
        ValueError, match=r"ids up to \d+, but the model's vocab_size is 100: raise vocab_size"
    ):
        prepare(corpus, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), model_vocab_size=100)
    with pytest.raises(ValueError, match=r"end_of_text = '</s>' is not a token.*<\|endoftext\|>"):
        prepare(corpus, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), end_of_text="</s>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction = 1.0"),
        ({"max_bytes": 0}, r"max_bytes = 0"),
        ({"vocab_size": None}, r"data.vocab_size is not set"),
        (
            {"vocab_size": 400, "model_vocab_size": 300},
            r"vocab_size = 400 is larger than the model's vocabulary, 300",
        ),
        ({"vocab_size": 100}, r"at least 257"),
    ],
)
def test_values_out_of_range_are_named(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path, **changes)


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"data\.cache_dir: cannot write to"):
        prepare(corpus, tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
