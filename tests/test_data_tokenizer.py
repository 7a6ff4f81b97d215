"""train/data/tokenizer.py: tokenizers trained here or read from disk."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest

from tests import hubs
from train.data import tokenizer as tok

TEXTS = [
    "def main():\n    return 'hello, hello, hello'\n",
    "for x in range(3):\n\tprint(x)  # ünïcödé 🙂\n",
] * 5


def test_every_text_comes_back(tmp_path):
    trained = tok.train_tokenizer(TEXTS, 300)
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = tok.load_tokenizer(tmp_path)

    for text in (*TEXTS, "never seen: \x00 \u4e2d\u6587 \n\n  ", " leading"):
        ids = loaded.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids) == text
        assert ids == trained.encode(text).ids
    assert trained.token_to_id(tok.END_OF_TEXT) == 0
    assert 257 <= trained.get_vocab_size() <= 300


def test_training_is_deterministic():
    assert tok.train_tokenizer(TEXTS, 320).to_str() == tok.train_tokenizer(TEXTS, 320).to_str()


def test_gpt2_files_give_the_same_ids(tmp_path):
    trained = tok.train_tokenizer(TEXTS, 300)
    trained.model.save(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}

    loaded = tok.load_tokenizer(tmp_path)

    assert loaded.encode(TEXTS[0]).ids == trained.encode(TEXTS[0]).ids
    assert loaded.decode(loaded.encode(TEXTS[1]).ids) == TEXTS[1]


def test_a_file_that_asks_for_truncation_cuts_nothing(tmp_path):
    trained = tok.train_tokenizer(TEXTS, 300)
    trained.enable_truncation(4)
    trained.enable_padding(length=4)
    trained.save(str(tmp_path / "tokenizer.json"))

    assert len(tok.load_tokenizer(tmp_path).encode(TEXTS[0]).ids) > 4


READ = """
import sys
from train.data import tokenizer
print(tokenizer.load_tokenizer(sys.argv[1]).to_str())
"""


def test_a_hub_id_is_fetched_without_weights(tmp_path):
    trained = tok.train_tokenizer(TEXTS, 300)
    folder = tmp_path / "someone" / "some-model"
    folder.mkdir(parents=True)
    trained.save(str(folder / "tokenizer.json"))
    for file in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (folder / file).write_text("{}")
    with hubs.serve(tmp_path) as (hub, fetched):
        done = subprocess.run(
            [sys.executable, "-c", READ, "someone/some-model"],
            env=os.environ | hub,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout.strip() == trained.to_str(), done.stderr
    assert fetched == ["someone/some-model/tokenizer.json"]


def test_a_mistyped_folder_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared").mkdir()
    for mistyped in ("prepared/cod", "tokeniser.json", str(tmp_path / "no-such-folder")):
        with pytest.raises(OSError, match=r"data\.tokenizer = "):
            tok.load_tokenizer(mistyped)


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json there"):
        tok.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match="not a tokenizer that can be read"):
        tok.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(OSError, match=r"data\.tokenizer = 'no/such-model': .* hub did not give it"):
        tok.load_tokenizer("no/such-model")
    with pytest.raises(ValueError, match="at least 257"):
        tok.train_tokenizer(TEXTS, 256)
