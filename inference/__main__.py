"""`python -m inference`: continues prompts with a checkpoint, read top to bottom.

check the flags -> find the checkpoint -> check the prompts -> read the parameters -> generate -> text and
speed
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from inference.generation_config import GenerationConfig
from inference.task_cli import find_task, run_task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from inference.loading import Checkpoint

DEFAULT_NEW_TOKENS = 128
EXAMPLES = """\
Continues prompts with a trained or downloaded language model.

examples:
  python -m inference --checkpoint runs/quickstart --prompt "def main("
  python -m inference --checkpoint runs/mine/checkpoints/400 --prompt-file story.txt
  python -m inference --checkpoint EleutherAI/gpt-j-6b --prompt "Once" --top-p 0.9
  python -m inference --checkpoint bigscience/bloom --mesh tensor=8 --weights int8 --dry-run
  python -m inference --checkpoint bigscience/bloom-7b1 --draft bigscience/bloom-560m --prompt "Once"

Other heads have commands of their own, each with its --help:
  python -m inference fill-mask | classify | answer | tag | choose | summarize

The most probable token is taken (greedy), unless one of --temperature, --top-k,
--top-p or --min-p asks for sampling; --temperature 0 is greedy too."""
Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    checkpoint: str
    """A run's folder (its newest step is taken), one of its checkpoints/STEP, a Hugging Face folder, or a hub id."""
    prompt: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="TEXT")] = ()
    """Text to continue; give several for a batch."""
    prompt_file: Annotated[tuple[Path, ...], Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """A UTF-8 file, read whole but for one newline at its end; may be given several times too."""
    max_new_tokens: int | None = None
    """Tokens to generate at most. By default 128, or what the model's window leaves."""
    temperature: float | None = None
    """Sample, with logits divided by this: below 1 is more predictable, above 1 more varied, 0 is greedy."""
    top_k: int | None = None
    """Sample from the k most probable tokens. 50 when sampling; 0 keeps all."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this total probability, in (0, 1]."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as probable as the most probable one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Makes tokens that have occurred less probable: 1 is off, 1.2 is firm."""
    seed: int = 0
    """Of the sampling: the same seed gives the same text."""
    mesh: str = ""
    """Devices to spread the model over, such as "tensor=2" (the first two) or "fsdp=2,tensor=-1" (-1: the rest)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To compute and to keep weights in; auto is float32 on a CPU (by far the fastest), else bfloat16."""
    weights: Literal["full", "int8"] = "full"
    """int8 keeps kernels in 8 bits, with a scale per output channel: half the memory of bfloat16."""
    cache: Literal["full", "int8"] = "full"
    """int8 keeps keys and values of earlier tokens in 8 bits, with a scale per token and head."""
    lookup: int | None = None
    """Guess so many tokens at a time from earlier text and check them in one pass: faster where text repeats."""
    draft: str | None = None
    """A smaller checkpoint of the same vocabulary, whose guesses this one checks: the same text, sooner."""
    draft_tokens: int | None = None
    """Tokens that --draft guesses at a time; 4 by default."""
    dry_run: bool = False
    """Print what a load would read and hold, by host and by device, and stop: needs a config.json and as much as
    there is of an index or of the headers of safetensors files, and no devices."""
    hosts: int | None = None
    """With --dry-run: plan for --mesh on so many machines, whether they are here or not."""
    stream: bool = True
    """Write text while it is generated. Several prompts are written one after another at the end."""

    def generation_config(self) -> GenerationConfig:
        """What the flags say about generation, but for the end of the text and the default length.

        Raises:
            ValueError: a value is out of range.
        """
        if self.draft_tokens is not None and self.draft is None:
            raise ValueError(f"--draft-tokens {self.draft_tokens}: there is no --draft to guess them")
        if self.hosts is not None:
            raise ValueError(f"--hosts {self.hosts} plans a load: give --dry-run with it, or leave it out")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature {self.temperature}: it is above 0, or 0 for the most probable token"
            )
        chosen = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        given = {name: value for name, value in chosen.items() if value is not None}
        try:
            return GenerationConfig(
                do_sample=bool(given) and self.temperature != 0,
                max_new_tokens=self.max_new_tokens,
                repetition_penalty=self.repetition_penalty,
                prompt_lookup_num_tokens=self.lookup,
                num_draft_tokens=self.draft_tokens,
                **given,
            )
        except ValueError as error:  # which names a field, and here it is a flag
            raise ValueError(re.sub(r"^GenerationConfig\.(\w+) = (.*?): ", _flag_of, str(error))) from None

    def jax_dtype(self) -> str:
        """The dtype to compute in; starts JAX where that decides it."""
        return default_dtype() if self.dtype == "auto" else self.dtype

    def quantize(self) -> str | None:
        """The kind of integers to keep weights in."""
        return None if self.weights == "full" else self.weights

    def prompts(self) -> list[str]:
        """The texts to continue.

        Raises:
            ValueError: there is none, or a file is not UTF-8.
            OSError: a file cannot be read.
        """
        texts = list(self.prompt)
        for file in self.prompt_file:
            try:
                texts.append(file.expanduser().read_text(encoding="utf-8").removesuffix("\n"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
            except OSError as error:
                raise OSError(f"cannot read {file}: {error.strerror}") from None
        if not texts:
            raise ValueError("nothing to continue: give --prompt TEXT or --prompt-file FILE")
        return texts


def _flag_of(field: re.Match[str]) -> str:
    others = {"prompt_lookup_num_tokens": "lookup", "num_draft_tokens": "draft_tokens"}
    return f"--{others.get(field[1], field[1]).replace('_', '-')} {field[2]}: "


def default_dtype() -> str:
    """What the machine computes fastest in."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags and generates.

    Args:
        args: of the command line; None takes the program's own.
    """
    args = sys.argv[1:] if args is None else list(args)
    with user_errors():
        if (found := find_task(args)) is not None:
            return run_task(*found)
        args = args[1:] if args[:1] == ["generate"] else args
        run(tyro.cli(Flags, args=args, prog="python -m inference", description=EXAMPLES))


def run(flags: Flags) -> None:
    """Continues the prompts and prints them, the speed and the checkpoint.

    Raises:
        OSError, ValueError: flags, prompts or checkpoint are at fault.
    """
    if flags.dry_run:
        return print_plan(flags)
    config, texts = flags.generation_config(), flags.prompts()
    started = time.perf_counter()

    import jax
    import numpy as np

    from inference.decode import stream
    from inference.drafting import check_draft
    from inference.loading import open_checkpoint, rules_of_mesh
    from inference.prompts import prepare_prompts
    from inference.text import encode, read_tokenizer

    rules = rules_of_mesh(flags.mesh)
    rules = None if rules is None else rules.for_decoding()
    checkpoint = open_checkpoint(flags.checkpoint, flags.jax_dtype(), cache=flags.cache)
    model, tokenizer = checkpoint.model, read_tokenizer(checkpoint.folder)
    drafts = None if flags.draft is None else open_draft(flags, tokenizer)

    rows = [encode(tokenizer, text) for text in texts]
    width, window = max(map(len, rows)), model.config.max_positions
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    room = DEFAULT_NEW_TOKENS if window is None else max(1, window - width)
    config = dataclasses.replace(
        config,
        max_new_tokens=config.max_new_tokens or min(DEFAULT_NEW_TOKENS, room),
        eos_token_id=checkpoint.eos_token_id,
    )
    # Before anything large is read:
    prompts = prepare_prompts(ids, mask, config, model.config.vocab_size, window)
    check_draft(model, drafts and (drafts.model, None), config, prompts.num_tokens)
    params = checkpoint.read_prepared(rules, flags.quantize())
    draft = drafts and (drafts.model, drafts.read_prepared(rules, flags.quantize()))
    jax.block_until_ready((params, draft and draft[1]))
    read = time.perf_counter() - started
    decoder = functools.partial(stream, model, params, ids, mask, config, rules=rules, draft=draft)
    outputs = [Output(text, row, tokenizer, config) for text, row in zip(texts, rows, strict=True)]
    speed = write(outputs, config, decoder, flags)
    sys.stdout.write(
        f"\n{speed}; reading the checkpoint took {read:.1f} s\ncheckpoint: {checkpoint.folder}\n"
    )


def open_draft(flags: Flags, tokenizer: "Tokenizer") -> "Checkpoint":
    """The checkpoint of --draft.

    Raises:
        OSError, ValueError: it is missing or damaged, or its tokens are others.
    """
    from inference.loading import open_checkpoint
    from inference.text import read_tokenizer

    assert flags.draft is not None
    draft = open_checkpoint(flags.draft, flags.jax_dtype(), cache=flags.cache)
    if read_tokenizer(draft.folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--draft {flags.draft}: its tokens are others than those of {flags.checkpoint}")
    return draft


def print_plan(flags: Flags) -> None:
    """Prints what loading the checkpoint would take."""
    import parallel
    from inference.dry_run import plan_load

    sizes = parallel.parse_mesh(flags.mesh)
    for checkpoint in filter(None, (flags.checkpoint, flags.draft)):
        plan = plan_load(checkpoint, sizes, flags.jax_dtype(), flags.quantize(), flags.hosts)
        sys.stdout.write(f"{plan}\n")


def write(
    outputs: list["Output"],
    config: GenerationConfig,
    decoder: Callable[..., Generator[Any, None, Any]],
    flags: Flags,
) -> str:
    """Generates and prints; returns a line on the speed."""
    import jax

    live = flags.stream and len(outputs) == 1
    started = time.perf_counter()
    guesses = flags.lookup or flags.draft  # which end with a chunk
    size = (16 if guesses else 4) if live else config.max_new_tokens
    chunks = decoder(rng=jax.random.key(flags.seed), chunk_size=size)
    first = next(chunks)  # by now both programs are compiled
    compiled = time.perf_counter()
    sys.stdout.write("generated:\n" + (outputs[0].text if live else ""))
    result = []
    for chunk in itertools.chain([first], collected(chunks, result)):
        for output, tokens in zip(outputs, chunk, strict=True):
            text = output.take(tokens)
            if live:
                sys.stdout.write(text)
                sys.stdout.flush()
    seconds = time.perf_counter() - compiled
    rests = [output.finish() for output in outputs]
    if not live:
        rests = [output.text + rest for output, rest in zip(outputs, rests, strict=True)]
    sys.stdout.write("\n\n".join(rests) + "\n")
    decoded = sum(output.num_tokens - 1 for output in outputs)  # the prefill gives each prompt its first
    rate = f"{decoded / seconds:.1f} tokens/s" if decoded else "one token a prompt, which is no rate"
    aside = f"{compiled - started:.1f} s of compiling and prefill are not counted"
    if result[0].num_guessed is not None:
        right, guessed, passes = (
            result[0].num_accepted.sum(),
            result[0].num_guessed.sum(),
            result[0].num_passes,
        )
        aside += f"; {right} of {guessed} guesses were right, and {decoded} tokens took {passes} passes"
    return f"{rate}: {decoded} tokens decoded in {seconds:.2f} s; {aside}"


def collected(chunks: Generator[Any, None, Any], result: list[Any]) -> Iterator[Any]:
    """What a generator yields; what it returns is appended to `result`."""
    result.append((yield from chunks))


class Output:
    """One prompt's text so far."""

    def __init__(self, text: str, prompt: list[int], tokenizer: "Tokenizer", config: GenerationConfig):
        from inference.text import TextStream

        self.text, self.num_tokens = text, 0
        self._stream, self._ends, self._ended = TextStream(tokenizer, prompt), config.eos_ids, False

    def take(self, tokens: Any) -> str:
        """Adds the next tokens, up to the one that ends the text; returns what they add to it."""
        added = ""
        for token in tokens.tolist():
            if self._ended:
                break
            self.num_tokens += 1
            self._ended = token in self._ends
            added += "" if self._ended else self._stream.push([token])
        self.text += added
        return added

    def finish(self) -> str:
        """What the text's last tokens held back."""
        return self._stream.finish()


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that is the user's to mend into one line and exit code 2.

    These are OSError, and ValueError raised by our own code. Anything else is a defect and keeps its
    traceback, as does everything if FLAXTRON_TRACEBACK is set.
    """
    here = Path(__file__).parents[1]
    ours = tuple(str(here / package) for package in ("modelzoo", "parallel", "inference"))
    try:
        # A terminal that is not UTF-8 shows what it can.
        for terminal in (sys.stdout, sys.stderr):
            if isinstance(terminal, io.TextIOWrapper):
                terminal.reconfigure(errors="replace")
        yield
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        raised_by_us = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(ours)
        if os.environ.get("FLAXTRON_TRACEBACK") or not (isinstance(error, OSError) or raised_by_us):
            raise
        sys.stderr.write(f"error: {str(error).splitlines()[0]}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
