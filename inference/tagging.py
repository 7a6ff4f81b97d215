"""Names in texts: the classes of tokens, and tokens of one name put together as transformers 4.57.6 does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding

from inference.task_model import Loaded, TaskModel, as_list, softmax

STRATEGIES = ("none", "simple", "first", "average", "max")


class Tag(TaskModel):
    """Says of every token, or of every name, which class it is of.

    Args:
        loaded, batch_size: as `TaskModel`.
        strategy: "none" tells of every token; "simple" joins neighbours of one class; "first", "average" and "max" make
            the tokens of a word agree before, on its first token's class, the mean of their probabilities, or the
            class that is surest.
        ignore: classes that are not told of.
    """

    name = "tag"
    tasks = ("token_classification",)

    def __init__(
        self,
        loaded: Loaded,
        batch_size: int = 8,
        strategy: str = "simple",
        ignore: Sequence[str] = ("O",),
    ):
        super().__init__(loaded, batch_size)
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy = {strategy!r}: choose from {', '.join(STRATEGIES)}")
        self.strategy, self.ignore = strategy, frozenset(ignore)

    def __call__(self, texts: Any) -> Any:
        """Tags texts.

        Args:
            texts: a text, or a list of them.

        Returns:
            For each text a list of dicts in its order: "entity" (of a token) or "entity_group", "score", "word",
            "start" and "end" in the text, and of a token its "index".

        Raises:
            ValueError: a text is empty or too long.
        """
        texts, alone = as_list(texts)
        encodings = [self.encode(text) for text in texts]
        found = []
        for text, encoding, (logits,) in zip(texts, encodings, self.run(encodings, "logits"), strict=True):
            tokens = self._tokens(text, encoding, softmax(logits))
            found.append([one for one in self._join(tokens) if self._class_of(one) not in self.ignore])
        return found[0] if alone else found

    def _class_of(self, entity: dict[str, Any]) -> str:
        return entity.get("entity_group") or entity["entity"]

    def _tokens(self, text: str, encoding: Encoding, scores: np.ndarray) -> list[dict[str, Any]]:
        """The tokens that are of the text."""
        found = []
        prefix = getattr(self.tokenizer.model, "continuing_subword_prefix", None)
        unknown = self.loaded.special.get("unk_token")
        for index, (number, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if encoding.special_tokens_mask[index]:
                continue
            word, written = encoding.tokens[index], text[start:end]
            if prefix:
                continues = len(word) != len(written)
            else:
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if number == unknown:
                word, continues = written, False
            place = dict(word=word, start=start, end=end, index=index)
            found.append(dict(place, scores=scores[index], continues=continues))
        return found

    def _join(self, tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.strategy in ("none", "simple"):
            entities = [self._entity(token["scores"], [token], token["word"]) for token in tokens]
            if self.strategy == "none":
                indices = (token["index"] for token in tokens)
                return [dict(entity, index=index) for entity, index in zip(entities, indices, strict=True)]
            return self._groups(entities)
        words: list[list[dict[str, Any]]] = []
        for token in tokens:
            if words and token["continues"]:
                words[-1].append(token)
            else:
                words.append([token])
        return self._groups([self._word(word) for word in words])

    def _word(self, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        """A word's class."""
        scores = {
            "first": lambda: tokens[0]["scores"],
            "max": lambda: max((token["scores"] for token in tokens), key=lambda scores: scores.max()),
            "average": lambda: np.mean([token["scores"] for token in tokens], axis=0),
        }[self.strategy]()
        return self._entity(scores, tokens, self._text([token["word"] for token in tokens]))

    def _entity(self, scores: np.ndarray, tokens: list[dict[str, Any]], word: str) -> dict[str, Any]:
        best = int(scores.argmax())
        place = dict(start=tokens[0]["start"], end=tokens[-1]["end"])
        return dict(entity=self.label(best), score=float(scores[best]), word=word, **place)

    def _groups(self, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Neighbours of one class together; "B-" begins another."""
        groups: list[list[dict[str, Any]]] = []
        for entity in entities:
            begins = entity["entity"].startswith("B-")
            if groups and not begins and _tag(groups[-1][-1]) == _tag(entity):
                groups[-1].append(entity)
            else:
                groups.append([entity])
        return [
            dict(
                entity_group=group[0]["entity"].split("-", 1)[-1],
                score=float(np.mean(np.array([entity["score"] for entity in group], np.float32))),
                word=self._text([entity["word"] for entity in group]),
                start=group[0]["start"],
                end=group[-1]["end"],
            )
            for group in groups
        ]

    def _text(self, words: list[str]) -> str:
        decoder = self.tokenizer.decoder
        return " ".join(words) if decoder is None else decoder.decode(words)


def _tag(entity: dict[str, Any]) -> str:
    """The class without the letter that says whether a name begins."""
    name = entity["entity"]
    return name[2:] if name.startswith(("B-", "I-")) else name
