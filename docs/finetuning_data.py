"""Small labelled data sets to fine-tune on, made of Python's own library and of sentences drawn from a seed.

    python docs/finetuning_data.py runs/finetuning-data

writes classify.jsonl, tag.jsonl, answer.jsonl, summarize.jsonl and their held-out parts (-eval.jsonl; of a source
file all rows or none), and prints what guessing reaches on each: the majority class, no name at all, the most frequent
answer, a copy of the text's beginning.
"""

import ast
import collections
import io
import json
import keyword
import random
import re
import sys
import sysconfig
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("asyncio", "email", "importlib", "tkinter", "unittest", "xml")


def main(folder: Path) -> None:
    """Writes the data sets."""
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    for name, rows in {
        "classify": classify(),
        "tag": tag(),
        "answer": answer(random.Random(1)),
        "summarize": summarize(random.Random(2)),
    }.items():
        held_out, kept = split(rows)
        for file, part in ((f"{name}-eval.jsonl", held_out), (f"{name}.jsonl", kept)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / file).write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(kept)} to train on, {len(held_out)} held out; {baseline(name, held_out, kept)}")


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(300 held out, to train on), both shuffled; rows from one file ("file") never part."""
    random.Random(3).shuffle(rows)
    files = [row.pop("file", str(i)) for i, row in enumerate(rows)]
    order = sorted(set(files))
    random.Random(6).shuffle(order)
    chosen, left = set(), len(rows) // 5
    for file in order:
        if left <= 0:
            break
        chosen.add(file)
        left -= files.count(file)
    held_out = [row for row, file in zip(rows, files, strict=True) if file in chosen]
    return held_out[:300], [row for row, file in zip(rows, files, strict=True) if file not in chosen]


def sources(*packages: str) -> list[tuple[str, str, str]]:
    """(package, name, source) of the library's files; the tests of packages left out."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for package in packages:
        for file in sorted((library / package).rglob("*.py")):
            if "test" not in file.parts:
                found.append(
                    (
                        package,
                        str(file.relative_to(library)),
                        file.read_text(encoding="utf-8", errors="ignore"),
                    )
                )
    return found


def classify() -> list[dict]:
    """Which package a piece of source code is from."""
    rows = []
    for package, file, text in sources(*PACKAGES):
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
        for start in range(0, len(lines) - 3, 4):
            piece = " ".join(lines[start : start + 4])
            if not any(name in piece for name in PACKAGES):  # which would give it away
                rows.append({"text": piece[:400], "label": package, "file": file})
    by_class = collections.defaultdict(list)
    for row in rows:
        by_class[row["label"]].append(row)
    return [
        row
        for name in sorted(by_class)
        for row in random.Random(4).sample(by_class[name], min(900, len(by_class[name])))
    ]


def tag() -> list[dict]:
    """Names in a line of Python: what is called, what is defined, attributes, modules that are imported."""
    rows, seen = [], set()
    for _, file, text in sources(*PACKAGES):
        for line in text.splitlines():
            words = _words(line.strip())
            if not 5 <= len(words) <= 24 or tuple(words) in seen:
                continue
            seen.add(tuple(words))
            rows.append({"tokens": words, "tags": _tags(words), "file": file})
    return random.Random(5).sample(rows, 6000)


def _words(line: str) -> list[str]:
    try:
        ast.parse(line if not line.endswith(":") else line + " pass")
        found = [token.string for token in tokenize.generate_tokens(io.StringIO(line).readline)]
    except (SyntaxError, tokenize.TokenError, ValueError):
        return []
    return [word for word in found if word.strip() and " " not in word and len(word) < 30]


def _tags(words: list[str]) -> list[str]:
    tags = []
    imports = words[0] in ("import", "from")
    for i, word in enumerate(words):
        before, after = words[i - 1] if i else "", words[i + 1] if i + 1 < len(words) else ""
        tag = "O"
        if word.isidentifier() and not keyword.iskeyword(word):
            if imports:
                tag = "I-MODULE" if before == "." else "B-MODULE"
            elif before in ("def", "class"):
                tag = "B-DEFINED"
            elif after == "(":
                tag = "B-CALLED"
            elif before == ".":
                tag = "B-ATTRIBUTE"
        tags.append(tag)
    return tags


PEOPLE = [
    f"{first} {last}"
    for first in "Ann Bob Cara Dan Eve Finn Gita Hugo Iris Jon".split()
    for last in "Berg Cole Diaz Endo Falk Gray".split()
]
CITIES = "Oslo Rome Lima Cairo Delhi Quito Osaka Paris Perth Dakar Turin Bergen".split()
THINGS = "report letter poem map song recipe manual speech diary contract".split()


def _filler(source: random.Random, count: int) -> str:
    subject = "the {} of the house was {} and nobody looked for it .".format
    kinds = ("door", "roof", "garden", "cellar", "window"), ("old", "red", "small", "cold", "quiet")
    return " ".join(subject(source.choice(kinds[0]), source.choice(kinds[1])) for _ in range(count))


def answer(source: random.Random) -> list[dict]:
    """Who, where or when, of a context that is longer than the model reads at once."""
    rows = []
    for _ in range(2500):
        who, where, when = source.choice(PEOPLE), source.choice(CITIES), str(source.randrange(1800, 2000))
        thing = source.choice(THINGS)
        fact = source.choice(
            (
                f"the {thing} was written by {who} in {where} in {when} .",
                f"in {when} , in {where} , {who} wrote the {thing} .",
            )
        )
        context = (
            f"{_filler(source, source.randrange(4))} {fact} {_filler(source, source.randrange(1, 4))}".strip()
        )
        kind, text = source.choice((("who wrote", who), ("where was", where), ("when was", when)))
        question = f"{kind} the {thing} ?" if kind == "who wrote" else f"{kind} the {thing} written ?"
        start = context.index(fact) + fact.index(text)
        rows.append(
            {"question": question, "context": context, "answers": {"text": [text], "answer_start": [start]}}
        )
    return rows


def summarize(source: random.Random) -> list[dict]:
    """A bulletin about an order between remarks, and what happened in a few words."""
    rows, items = [], "lamps chairs ropes books bells boots tiles drums masks coats".split()
    for _ in range(4000):
        item, city, days = source.choice(items), source.choice(CITIES), source.randrange(2, 10)
        late = source.random() < 0.5
        arrival = (
            "came in {} days after the day that was agreed"
            if late
            else "stood here {} days before anybody asked"
        )
        fact = f"the {item} that we ordered from {city} {arrival.format(days)} ."
        text = f"{_filler(source, source.randrange(3))} {fact} {_filler(source, source.randrange(3))}".strip()
        rows.append(
            {"text": text, "summary": f"{city} {'late' if late else 'early'} by {days} days : {item}"}
        )
    return rows


def baseline(name: str, held_out: list[dict], train: list[dict]) -> str:
    """What guessing reaches."""
    if name == "classify":
        share = max(collections.Counter(row["label"] for row in held_out).values()) / len(held_out)
        return f"accuracy of the most frequent class {share:.3f}"
    if name == "tag":
        tags = [tag for row in held_out for tag in row["tags"]]
        return f"accuracy of all O {tags.count('O') / len(tags):.3f}, F1 0"
    sys.path.insert(0, str(ROOT))
    from train.tasks import scores

    if name == "answer":
        common = collections.Counter(row["answers"]["text"][0] for row in train).most_common(1)[0][0]
        found = scores.squad([row["answers"]["text"] for row in held_out], [common] * len(held_out))
        return "the most frequent answer: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items())
    targets = [row["summary"] for row in held_out]
    copies = {
        "all of the text": [row["text"] for row in held_out],
        "its first sentence": [re.split(r"(?<=\.) ", row["text"])[0] for row in held_out],
    }
    return "; ".join(
        f"a copy of {what}: rouge1 {found['rouge1']:.3f}, rougeL {found['rougeL']:.3f}"
        for what, texts in copies.items()
        for found in [scores.summaries(targets, texts)]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/finetuning-data"))
