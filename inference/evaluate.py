"""`python -m inference.evaluate`: perplexity on text files, and results on the tasks of lm-evaluation-harness."""

import dataclasses
import functools
import json
import operator
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from inference.__main__ import user_errors
from inference.task_cli import check_output

EXAMPLES = """\
Measures a language model.

examples:
  python -m inference.evaluate --checkpoint runs/mine --text-file held_out.txt
  python -m inference.evaluate --checkpoint EleutherAI/gpt-j-6b --text-file a.jsonl --window 1024 --stride 256
  python -m inference.evaluate --checkpoint runs/mine --task lambada_openai --task piqa --limit 100

Text files give the perplexity: every token is predicted once, from the tokens before it
in its window, and windows advance by --stride: a short stride sees more and takes longer.
Tasks are those of EleutherAI's lm-evaluation-harness (pip install 'flaxtron[eval]')."""
Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    checkpoint: str
    """A training run's folder, one of its checkpoints/STEP folders, a Hugging Face folder, or a hub id."""
    text_file: Annotated[tuple[Path, ...], Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """UTF-8 text to measure the perplexity of; of a .jsonl file, the "text" of every line on its own."""
    task: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME")] = ()
    """A task of lm-evaluation-harness; may be given several times, as may --text-file."""
    window: int | None = None
    """Tokens that the model sees at a time; by default all that it can, or 2048."""
    stride: int | None = None
    """Tokens by which windows advance; by default half a window."""
    batch_size: int = 4
    """Windows, or texts of a task, that go through the model together."""
    include_path: Path | None = None
    """A folder with tasks of your own, as yaml files."""
    num_fewshot: int | None = None
    """Examples before each question, where a task takes them."""
    limit: int | None = None
    """Only so many examples of each task."""
    mesh: str = ""
    """Devices to spread the model over, such as "tensor=2" or "fsdp=2,tensor=-1" (-1: the rest)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To compute and to keep weights in; auto is float32 on a CPU, else bfloat16."""
    weights: Literal["full", "int8"] = "full"
    """int8 keeps kernels in 8 bits, with a scale per output channel."""
    output: Path | None = None
    """Write the results to this JSON file too."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags and measures.

    Args:
        args: of the command line; None takes the program's own.
    """
    flags = tyro.cli(Flags, args=args, prog="python -m inference.evaluate", description=EXAMPLES)
    with user_errors():
        results = run(flags)
        if flags.output is not None:
            flags.output.expanduser().write_text(
                json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8"
            )


def run(flags: Flags) -> dict[str, Any]:
    """Measures and prints.

    Returns:
        "perplexity": by file; "tasks": the harness's results.

    Raises:
        OSError, ValueError: flags, files or checkpoint are at fault.
    """
    if not flags.text_file and not flags.task:
        raise ValueError("nothing to measure: give --text-file FILE or --task NAME")
    if flags.batch_size < 1:
        raise ValueError(f"batch_size = {flags.batch_size}: it is at least 1")
    check_output(flags.output)
    texts = {file: read_texts(file) for file in flags.text_file}
    if flags.task:
        try:
            import lm_eval  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            raise ValueError("--task needs lm-evaluation-harness: pip install 'flaxtron[eval]'") from None
        manager = task_manager(flags)

    from inference.__main__ import default_dtype
    from inference.loading import open_checkpoint, rules_of_mesh
    from inference.scoring import check_strides
    from inference.text import read_tokenizer

    rules = rules_of_mesh(flags.mesh)
    checkpoint = open_checkpoint(flags.checkpoint, default_dtype() if flags.dtype == "auto" else flags.dtype)
    tokenizer = read_tokenizer(checkpoint.folder)
    window, stride = check_strides(checkpoint.model, flags.window, flags.stride)
    params = checkpoint.read_prepared(rules, None if flags.weights == "full" else flags.weights)
    results: dict[str, Any] = {}
    if texts:
        measure = Measure(checkpoint.model, params, tokenizer, rules, window, stride, flags.batch_size)
        results["perplexity"] = measure.files(texts)
    if flags.task:
        results["tasks"] = harness_results(flags, manager, checkpoint, params, tokenizer, rules)
    sys.stdout.write(f"checkpoint: {checkpoint.folder}\n")
    return results


def read_texts(file: Path) -> list[str]:
    """The texts of a file: of a .jsonl one per line, else one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or a line is no object with a "text"; or it is empty.
    """
    try:
        content = file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise OSError(f"cannot read {file}: {error.strerror}") from None
    texts = [content]
    if file.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(content.splitlines(), 1):
            try:
                texts += [json.loads(line)["text"]] if line.strip() else []
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{file}:{number}: not an object with a "text"') from None
    if not any(texts):
        raise ValueError(f"{file} holds no text")
    return texts


@dataclasses.dataclass(frozen=True)
class Measure:
    """Perplexities of files under one model; the fields are those of `scoring.perplexity`."""

    model: Any
    params: Any
    tokenizer: Any
    rules: Any
    window: int
    stride: int
    batch_size: int

    def files(self, texts: dict[Path, list[str]]) -> dict[str, Any]:
        """Prints a line for each file and one for all; returns the numbers."""
        from inference import scoring
        from inference.progress import progress_bar

        encoded = {
            file: [(self.tokenizer.encode(text).ids, len(text.encode())) for text in group]
            for file, group in texts.items()
        }
        windows = sum(
            len(scoring.strides(len(ids), self.window, self.stride))
            for group in encoded.values()
            for ids, _ in group
        )
        found: dict[str, scoring.Perplexity] = {}
        started = time.perf_counter()
        with progress_bar("windows", windows) as advance:
            for file, group in encoded.items():
                parts = [self._one(ids, size, advance) for ids, size in group]
                parts = [part for part in parts if part is not None]
                if not parts:
                    raise ValueError(f"{file}: no text in it has two tokens, so none follows another")
                found[str(file)] = functools.reduce(operator.add, parts)
        seconds = time.perf_counter() - started
        total = functools.reduce(operator.add, found.values())
        shown = dict(found, all=total) if len(found) > 1 else found
        for name, one in shown.items():
            sys.stdout.write(
                f"{name}: perplexity {one.perplexity:.4f} over {one.num_tokens} tokens, {one.per_token:.4f} nats a "
                f"token, {one.bits_per_byte:.4f} bits a byte\n"
            )
        sys.stdout.write(
            f"window {self.window}, stride {self.stride}; {total.num_tokens / seconds:.0f} tokens/s with compiling\n"
        )
        return {
            name: dict(dataclasses.asdict(one), perplexity=one.perplexity, bits_per_byte=one.bits_per_byte)
            for name, one in shown.items()
        }

    def _one(self, ids: list[int], num_bytes: int, progress: Any) -> Any:
        from inference import scoring

        if len(ids) < 2:
            return None
        shape = (self.window, self.stride, self.batch_size)
        result = scoring.perplexity(self.model, self.params, ids, *shape, self.rules, progress)
        return dataclasses.replace(result, num_bytes=num_bytes)


def task_manager(flags: Flags) -> Any:
    """The harness's tasks, with those of --include-path.

    Raises:
        OSError: there is no such folder.
        ValueError: there is no such task.
    """
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    folder = flags.include_path
    if folder is not None and not folder.is_dir():
        raise OSError(f"--include-path {folder}: there is no such folder")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in flags.task if not manager.match_tasks([name])]:
        nor = (
            ": --include-path names a folder with tasks of your own"
            if folder is None
            else f", nor in {folder}"
        )
        raise ValueError(f"--task {unknown[0]}: there is none in lm-evaluation-harness{nor}")
    return manager


def harness_results(
    flags: Flags, manager: Any, checkpoint: Any, params: Any, tokenizer: Any, rules: Any
) -> dict[str, Any]:
    """Runs the tasks, prints the harness's table, returns its results."""
    import lm_eval  # type: ignore[import-not-found]
    from lm_eval.utils import make_table  # type: ignore[import-not-found]

    from inference.harness import HarnessModel

    model = HarnessModel.of(checkpoint, params, tokenizer, rules, flags.batch_size, flags.window)
    options = dict(num_fewshot=flags.num_fewshot, limit=flags.limit, task_manager=manager)
    evaluate: Any = lm_eval.simple_evaluate  # whose decorator hides its parameters
    results: Any = evaluate(model=model, tasks=list(flags.task), **options)
    sys.stdout.write(make_table(results) + "\n")
    return dict(results["results"])


if __name__ == "__main__":
    main()
