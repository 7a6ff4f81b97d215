"""`python -m inference TASK`: fill-mask, classify, answer, tag, choose and summarize on texts and files.

check the flags -> read the texts -> open the checkpoint -> run -> a few lines for a person, or JSON lines
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Repeated = tyro.conf.UseAppendAction
Texts = Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="TEXT")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every task takes."""

    checkpoint: str
    """A training run's folder, one of its checkpoints/STEP folders, a Hugging Face folder, or a hub id."""
    file: Annotated[tuple[Path, ...], Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """A UTF-8 file: of a .jsonl every line is an object, of any other every line a text. May be given several times."""
    output: Path | None = None
    """Write results to this file, a JSON object a line, rather than to the terminal."""
    batch_size: int = 8
    """Texts that go through the model together."""
    mesh: str = ""
    """Devices to spread the model over, such as "tensor=2"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To compute and to keep weights in; auto is float32 on a CPU, else bfloat16."""
    weights: Literal["full", "int8"] = "full"
    """int8 keeps kernels in 8 bits, with a scale per output channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillMask(Common):
    """Says what may stand in place of a mask.

    example:  python -m inference fill-mask --checkpoint roberta-base --text "Oslo is the capital of <mask>."
    A line of a .jsonl file is {"text": ...}.
    """

    text: Texts = ()
    """A text with the tokenizer's mask in it; give several for a batch."""
    top_k: int = 5
    """How many tokens to tell of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Common):
    """Says which class a text is of.

    example:  python -m inference classify --checkpoint runs/reviews --text "A joy." --text "Two hours lost."
    A line of a .jsonl file is {"text": ...}, or {"text": ..., "text_pair": ...} for two texts.
    """

    text: Texts = ()
    """A text; give several for a batch."""
    top_k: int = 1
    """How many classes to tell of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Common):
    """Finds answers in a text, which may be long.

    example:  python -m inference answer --checkpoint runs/squad --question "Who wrote it?" --context-file book.txt
    A line of a .jsonl file is {"question": ..., "context": ...}.
    """

    question: Texts = ()
    """A question; give several for a batch."""
    context: str | None = None
    """The text that holds the answers."""
    context_file: Path | None = None
    """A UTF-8 file with it."""
    top_k: int = 1
    """How many answers to tell of."""
    max_answer_len: int = 15
    """Tokens of an answer at most."""
    may_be_empty: bool = False
    """An empty answer, where the text has none, is one of those to choose from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tag(Common):
    """Finds names and says which class they are of.

    example:  python -m inference tag --checkpoint runs/names --text "Ann lives in Oslo."
    A line of a .jsonl file is {"text": ...}.
    """

    text: Texts = ()
    """A text; give several for a batch."""
    strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    """none tells of every token, simple joins neighbours of one class; the others make a word's tokens agree before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choose(Common):
    """Says which of several continuations fits a text.

    example:  python -m inference choose --checkpoint runs/swag --text "She" --choice "went in." --choice "flew."
    A line of a .jsonl file is {"text": ..., "choices": [...]}.
    """

    text: Texts = ()
    """A text; give several for a batch."""
    choice: Texts = ()
    """One of the choices; give two or more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summarize(Common):
    """Writes what an encoder-decoder makes of a text.

    example:  python -m inference summarize --checkpoint RUCAIBox/mvp --text "Summarize: You may want to ..."
    A line of a .jsonl file is {"text": ...}.
    """

    text: Texts = ()
    """A text; give several for a batch."""
    num_beams: int | None = None
    """Hypotheses to follow; by default as the checkpoint says, or 4."""
    max_new_tokens: int | None = None
    """Tokens to write at most; by default as the checkpoint says, or 256."""
    length_penalty: float | None = None
    """Above 0 longer summaries win, below 0 shorter ones; by default as the checkpoint says, or 1."""


COMMANDS: dict[str, type[Any]] = {
    "fill-mask": FillMask,
    "classify": Classify,
    "answer": Answer,
    "tag": Tag,
    "choose": Choose,
    "summarize": Summarize,
}
OTHER_NAMES = {"summarise": "summarize"}
OF_CLASS = {"answer": ("top_k", "max_answer_len", "may_be_empty"), "tag": ("strategy",)}
OF_CALL = {"fill-mask": ("top_k",), "classify": ("top_k",)}
GENERATION = ("num_beams", "max_new_tokens", "length_penalty")


def find_task(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    """(the task, the other arguments) of `TASK ...` or `--task TASK ...`; None where no task is named.

    Raises:
        ValueError: there is no such task.
    """
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    elif "--task" in rest and rest.index("--task") + 1 < len(rest):
        at = rest.index("--task")
        name = rest[at + 1]
        del rest[at : at + 2]
    else:
        return None
    name = OTHER_NAMES.get(name, name)
    if name == "generate":
        return None
    if name not in COMMANDS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(COMMANDS)}, or none to generate")
    return name, rest


def run_task(name: str, arguments: Sequence[str]) -> None:
    """Reads the task's flags, runs it, and writes the results.

    Raises:
        OSError, ValueError: flags, files or the checkpoint are at fault.
    """
    kind = COMMANDS[name]
    flags = tyro.cli(kind, args=list(arguments), prog=f"python -m inference {name}", description=kind.__doc__)
    check_output(flags.output)
    texts = list(read_inputs(name, flags))
    if not texts:
        given = "--question TEXT with --context TEXT" if name == "answer" else "--text TEXT"
        raise ValueError(f"nothing to do: give {given}, or --file FILE")

    from inference.__main__ import default_dtype
    from inference.loading import rules_of_mesh
    from inference.text_tasks import open_task

    rules = rules_of_mesh(flags.mesh)
    options = {key: getattr(flags, key) for key in OF_CLASS.get(name, ())}
    if name == "summarize":
        options = {key: getattr(flags, key) for key in GENERATION if getattr(flags, key) is not None}
    task = open_task(
        name,
        flags.checkpoint,
        dtype=default_dtype() if flags.dtype == "auto" else flags.dtype,
        quantize=None if flags.weights == "full" else flags.weights,
        rules=rules,
        batch_size=flags.batch_size,
        **options,
    )
    results = task(texts, **{key: getattr(flags, key) for key in OF_CALL.get(name, ())})
    lines = [dict(_as_object(text), result=found) for text, found in zip(texts, results, strict=True)]
    if flags.output is not None:
        written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        flags.output.expanduser().write_text(written, encoding="utf-8")
        sys.stdout.write(f"{len(lines)} results in {flags.output}\n")
        return
    for line in lines:
        sys.stdout.write("\n".join(show(name, line)) + "\n")


def read_inputs(name: str, flags: Any) -> Iterator[Any]:
    """The texts of the flags, then those of the files: strings, or objects with what the task needs.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is not UTF-8, or a line of it is not what the task reads.
    """
    needed = {"answer": ("question", "context"), "choose": ("text", "choices")}.get(name, ("text",))
    if name == "answer":
        context = flags.context
        if flags.context_file is not None:
            context = read_text(flags.context_file)
        if flags.question and not context:
            raise ValueError("--question needs the text to look in: --context TEXT or --context-file FILE")
        yield from (dict(question=question, context=context) for question in flags.question)
    elif name == "choose":
        if flags.text and len(flags.choice) < 2:
            raise ValueError("--text needs two or more of --choice TEXT")
        yield from (dict(text=text, choices=list(flags.choice)) for text in flags.text)
    else:
        yield from flags.text
    for file in flags.file:
        if file.suffix == ".csv":
            example = json.dumps(dict.fromkeys(needed, "..."))
            raise ValueError(
                f"{file}: tables are not read here: write a .jsonl file of lines such as {example}"
            )
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            if file.suffix != ".jsonl":
                if len(needed) > 1:
                    raise ValueError(
                        f"{file}: {name} reads .jsonl files, whose lines have {' and '.join(needed)}"
                    )
                yield line
                continue
            try:
                content = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not JSON ({error})") from None
            if not isinstance(content, dict) or any(key not in content for key in needed):
                has = f": it has {', '.join(content)}" if isinstance(content, dict) and content else ""
                raise ValueError(f"{file}:{number}: not an object with {' and '.join(needed)}{has}")
            yield content if len(needed) > 1 or "text_pair" in content else content["text"]


def check_output(file: Path | None) -> None:
    """Refuses a file of results that could not be written, before anything is computed.

    Raises:
        OSError: its folder is not there, or it is a folder itself.
    """
    if file is not None and file.expanduser().is_dir():
        raise OSError(f"--output {file}: it is a folder; name a file in it")
    if file is not None and not file.expanduser().parent.is_dir():
        raise OSError(f"--output {file}: there is no folder {file.parent}")


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise OSError(f"cannot read {file}: {error.strerror}") from None


def show(name: str, line: dict[str, Any]) -> Iterator[str]:
    """Lines on one result, for a person."""
    yield str(line.get("question", line.get("text", "")))
    result = line["result"]
    if name == "summarize":
        yield f"  {result['summary_text']}"
        return
    several = bool(result) and isinstance(result[0], list)  # masks
    for group in result if several else [result]:
        for one in group:
            what = {
                "fill-mask": lambda one: f"{one['token_str']!r:16} {one['sequence']}",
                "classify": lambda one: one["label"],
                "answer": lambda one: f"{one['answer']!r}  (characters {one['start']} to {one['end']})",
                "tag": lambda one: f"{one.get('entity_group', one.get('entity')):8} {one['word'].strip()!r}",
                "choose": lambda one: one["choice"],
            }[name](one)
            yield f"  {one['score']:.4f}  {what}"
        if several:
            yield ""


def _as_object(text: Any) -> dict[str, Any]:
    return dict(text) if isinstance(text, dict) else {"text": text}
