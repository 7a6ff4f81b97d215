"""Tokenizers as checkpoints' folders hold them: what inference reads texts with, and fine-tuning too."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

END_OF_TEXT = "<|endoftext|>"
USUAL = {
    "mask_token": ("<mask>", "[MASK]"),
    "cls_token": ("<s>", "[CLS]"),
    "sep_token": ("</s>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "eos_token": ("</s>", END_OF_TEXT),
}
"""What tokens are mostly called."""
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""BERT's special tokens, in the order of their ids where a vocabulary is made anew."""


def read_tokenizer(folder: Any) -> Tokenizer:
    """Reads the tokenizer that lies in a checkpoint's folder.

    Args:
        folder: a pathlib.Path or the like; holds tokenizer.json, or vocab.json and merges.txt as GPT-2 and RoBERTa
            have them, or vocab.txt as BERT has it.

    Raises:
        OSError: none of them is there.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    whole, vocab, merges, words = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    )
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocab.is_file() and merges.is_file():
            tokenizer = _byte_level(vocab, merges)
        elif words.is_file():
            tokenizer = _word_piece(folder, words)
        else:
            raise OSError(
                f"no tokenizer in {folder}: there is no tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt"
            )
    except OSError:
        raise
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        raise ValueError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    # A file may ask for truncation or padding; a prompt is to be read as it is.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_level(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's, or RoBERTa's, which has tokens to stand around a text."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    if first is not None and last is not None:
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", last), ("<s>", first), add_prefix_space=False
        )
        known = [
            token for token in ("<s>", "<pad>", "</s>", "<unk>") if tokenizer.token_to_id(token) is not None
        ]
        tokenizer.add_special_tokens([*known, AddedToken("<mask>", lstrip=True)])
    elif tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _word_piece(folder: Path, words: Path) -> Tokenizer:
    """BERT's; it writes all in lower case unless tokenizer_config.json says otherwise."""
    config = folder / "tokenizer_config.json"
    lower = json.loads(config.read_text()).get("do_lower_case", True) if config.is_file() else True
    return word_piece_tokenizer(models.WordPiece.from_file(str(words), unk_token="[UNK]"), lowercase=lower)


def word_piece_tokenizer(model: models.WordPiece, lowercase: bool = True) -> Tokenizer:
    """What stands around BERT's word pieces: how texts are cut into words, its special tokens, one text or two.

    Args:
        model: a vocabulary that has [CLS] and [SEP].
        lowercase: whether it knows lower case alone; accents go too then.
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([token for token in BERT if tokenizer.token_to_id(token) is not None])
    around = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", around
    )
    return tokenizer


def special_tokens(folder: Any, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that a folder names for a purpose, such as mask_token and sep_token.

    Args:
        folder: holds tokenizer_config.json or special_tokens_map.json, or neither: then usual spellings count.
        tokenizer: its tokenizer.

    Raises:
        ValueError: a file is damaged.
    """
    found: dict[str, int] = {}
    for purpose, spellings in USUAL.items():
        for token in reversed(spellings):
            if (number := tokenizer.token_to_id(token)) is not None:
                found[purpose] = number
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = Path(folder) / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for purpose, token in content.items():
                text = token.get("content") if isinstance(token, dict) else token
                number = tokenizer.token_to_id(text) if isinstance(text, str) else None
                if purpose.endswith("_token") and number is not None:
                    found[purpose] = number
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a JSON object: {error}") from None
    return found
