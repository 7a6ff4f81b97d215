"""train/data/tokens.py: prepared folders, the cache that keeps them, what is held out, mixtures."""

import json
import shutil

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
    return tokenizer.decode(tokens(data, split).tolist(), skip_special_tokens=False).split("<|endoftext|>")


def tokens(data, split):
    (part,) = getattr(data, split)
    return part.read(0, part.num_tokens)


def test_documents_are_joined_by_the_end_of_text_token(corpus, tmp_path):
    data = prepare(corpus, tmp_path)
    texts = {file.read_text() for file in corpus.iterdir()}
    train, held_out = decode(data, "train")[:-1], decode(data, "validation")[:-1]

    assert set(train) | set(held_out) == texts
    assert len(train) + len(held_out) == 40
    assert train == sorted(train)  # in the order of the files
    assert 0 < len(held_out) < 10
    assert data.manifest["dtype"] == "uint16"
    assert data.manifest["documents"] == 40
    assert data.manifest["train_tokens"] == data.train[0].num_tokens
    assert tokens(data, "train")[-1] == data.manifest["end_of_text_id"] == 0


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

    assert data.validation[0].num_tokens > 0
    assert (tokens(data, "train") == 0).sum() + (tokens(data, "validation") == 0).sum() == 1


def test_no_fraction_holds_nothing_out(corpus, tmp_path):
    assert prepare(corpus, tmp_path, validation_fraction=0.0).validation[0].num_tokens == 0


def test_second_call_reads_the_cache(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, tmp_path)
    monkeypatch.setattr(tokens_lib, "build", lambda *_: pytest.fail("built again"))
    second = prepare(corpus, tmp_path)

    assert (first.built, second.built) == (True, False)
    np.testing.assert_array_equal(tokens(first, "train"), tokens(second, "train"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


@pytest.mark.parametrize("damage", ["train-00000.arrayrecord", "manifest.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_anew(corpus, tmp_path, damage):
    first = prepare(corpus, tmp_path)
    kept = tokens(first, "train")
    file = first.folder / damage
    file.write_bytes(file.read_bytes()[:150])

    second = prepare(corpus, tmp_path)

    assert second.built
    np.testing.assert_array_equal(tokens(second, "train"), kept)


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


def test_special_tokens_in_the_text_are_text(tmp_path):
    file = tmp_path / "doc.txt"
    file.write_text("before <|endoftext|> after " * 20)

    data = prepare(file, tmp_path, validation_fraction=0.0)

    assert (tokens(data, "train") == 0).sum() == 1


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
        ({"mixture": {"x": 1.0}}, r"data\.path and data\.mixture: both are set"),
    ],
)
def test_values_out_of_range_are_named(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path, **changes)


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"data\.cache_dir: cannot write to"):
        prepare(corpus, tmp_path, cache_dir=str(tmp_path / "file" / "cache"))


@pytest.fixture
def folders(corpus, tmp_path):
    """Two prepared folders with one tokenizer, as `python -m train.data` makes them."""
    train_tokenizer(["the number is a square " * 9], 280).save(str(tmp_path / "tokenizer.json"))
    found = []
    for name in ("a", "b"):
        data = prepare(corpus, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.1)
        found.append(data.folder.rename(tmp_path / name))
        (corpus / "00.txt").write_text("another text")
    return [str(folder) for folder in found]


def test_a_prepared_folder_is_a_path(folders, tmp_path):
    data = prepare_tokens(folders[0], model_vocab_size=300, vocab_size=300)

    assert not data.built
    assert data.folder == tmp_path / "a"
    assert data.manifest["documents"] == data.train[0].num_documents + data.validation[0].num_documents == 40


def test_a_mixture_has_shares(folders):
    weights = {folders[0]: 3, folders[1]: 1.0}
    data = prepare_tokens(mixture=weights)
    other = prepare_tokens(mixture=weights | {folders[1]: 2.0})

    assert data.weights == (0.75, 0.25)
    assert [part.num_documents for part in data.train] == [
        prepare_tokens(folder).train[0].num_documents for folder in folders
    ]
    assert data.manifest["documents"] == 80
    assert data.manifest["fingerprint"] not in (
        other.manifest["fingerprint"],
        *(prepare_tokens(folder).manifest["fingerprint"] for folder in folders),
    )
    with pytest.raises(ValueError, match=r"data\.mixture = .*a weight above 0"):
        prepare_tokens(mixture={folders[0]: 0.0})


def test_folders_of_another_tokenizer_are_refused(folders, corpus, tmp_path):
    trained = prepare(corpus, tmp_path, vocab_size=290)
    with pytest.raises(ValueError, match="was prepared with another tokenizer than"):
        prepare_tokens(mixture={folders[0]: 1.0, str(trained.folder): 1.0})
    with pytest.raises(ValueError, match=r"prepared with another tokenizer than data\.tokenizer = "):
        prepare_tokens(folders[0], tokenizer=str(trained.tokenizer_file))
    with pytest.raises(ValueError, match=r"ids up to \d+, but the model's vocab_size is 258"):
        prepare_tokens(folders[0], model_vocab_size=258)
    shutil.copy(trained.tokenizer_file, folders[0])
    with pytest.raises(ValueError, match=r"a/tokenizer\.json: not the tokenizer that the manifest"):
        prepare_tokens(folders[0])


def test_a_damaged_or_unfinished_folder_is_named(folders, tmp_path):
    (tmp_path / "a" / "train-00000.arrayrecord").write_bytes(b"short")
    with pytest.raises(OSError, match=r"train-00000\.arrayrecord: 5 bytes, of \d+ in the manifest"):
        prepare_tokens(folders[0])
    manifest = tmp_path / "b" / "manifest.json"
    (tmp_path / "b" / "plan.json").write_text(json.dumps(json.loads(manifest.read_text())["plan"]))
    manifest.unlink()
    with pytest.raises(OSError, match=r"b: these tokens are not finished"):
        prepare_tokens(folders[1])
