"""Writes the README's table of models: one row a class, from the registry and tests/parity/results.json.

make table
"""

import json
from pathlib import Path
from typing import Any

from modelzoo import registry

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "tests/parity/results.json"
BEGIN, END = "<!-- begin: models, by `make table` -->", "<!-- end: models -->"
HEADS = {
    "base": "none: hidden states",
    "causal_lm": "next token",
    "unshifted_lm": "next token, labels shifted by the caller",
    "masked_lm": "masked token",
    "seq2seq_lm": "next token of the target",
    "sequence_classification": "class or number of a sequence",
    "token_classification": "class of every token",
    "question_answering": "first and last token of an answer",
    "multiple_choice": "one of several sequences",
    "double_heads": "next token, and one of several sequences",
    "next_sentence": "whether a sentence follows",
    "pretraining": "masked token, and whether a sentence follows",
}
"""A class's task -> what its head says."""


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's cells, a list for each class.

    Args:
        results: class -> "outputs", "loss" and "gradient", the largest differences, and "configs", how many.
    """
    found = []
    for family in registry.FAMILIES.values():
        text, address = family.paper
        folder = family.classes[0].__module__.replace(".", "/")
        for cls in family.classes:
            measured = results.get(cls.__name__, {})
            numbers = [
                f"{measured[key]:.0e}" if key in measured else "" for key in ("outputs", "loss", "gradient")
            ]
            name = f"[{family.title}]({folder}.py)"
            found.append([name, f"`{cls.__name__}`", HEADS[cls.task], f"[{text}]({address})", *numbers])
    return found


def render(results: dict[str, dict[str, Any]]) -> str:
    """The table and the list of presets, in Markdown."""
    header = ["family", "class", "its head says", "paper", "outputs", "loss", "gradients"]
    table = [header, ["---"] * 4 + ["---:"] * 3, *rows(results)]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    presets = ", ".join(f"`{preset}`" for family in registry.FAMILIES.values() for preset in family.presets)
    return "\n".join([*lines, "", f"Presets of `modelzoo.get_config`: {presets}."])


def updated(readme: str, table: str) -> str:
    """The README's text with the table between its two comments.

    Raises:
        ValueError: the comments are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: the lines {BEGIN!r} and {END!r} are missing")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    shown = render(json.loads(RESULTS.read_text(encoding="utf-8")))
    README.write_text(updated(README.read_text(encoding="utf-8"), shown), encoding="utf-8")
