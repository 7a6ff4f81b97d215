"""A model for EleutherAI's lm-evaluation-harness (`pip install 'flaxtron[eval]'`), equal to its own of transformers.

    results = lm_eval.simple_evaluate(inference.harness.HarnessModel.load("runs/mine"), tasks=["lambada_openai"])

https://github.com/EleutherAI/lm-evaluation-harness, 0.4.10 and later. `python -m inference.evaluate --task NAME` is
the command line.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils  # type: ignore[import-not-found]
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
from tokenizers import Tokenizer

import modelzoo
import parallel
from inference.decode import generate
from inference.generation_config import GenerationConfig
from inference.loading import Checkpoint, open_checkpoint
from inference.progress import progress_bar
from inference.scoring import Passage, score
from inference.text import read_tokenizer, special_tokens

MAX_NEW_TOKENS = 256
"""Where a task does not say."""
DEFAULT_WINDOW = 2048
"""Of models without a limit."""
GENERATION = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams"}


class HarnessModel(TemplateLM):
    """A causal language model as the harness asks for one.

    Args:
        model: the model.
        params: its parameters, best from `prepare`.
        tokenizer: its tokenizer.
        end_id: the token that ends a text, and that stands before one.
        bos_id: what stands before a text instead, where there is one.
        batch_size: texts per call.
        rules: of the mesh that the parameters lie on.
        max_length: tokens that the model is shown at most; None is all positions it has.
    """

    backend = "causal"

    def __init__(
        self,
        model: modelzoo.Model,
        params: Any,
        tokenizer: Tokenizer,
        end_id: int,
        bos_id: int | None = None,
        batch_size: int = 8,
        rules: parallel.Rules | None = None,
        max_length: int | None = None,
    ):
        super().__init__()
        self.model, self.params, self.tokenizer, self.rules = model, params, tokenizer, rules
        self.batch_size = batch_size
        self.max_length = max_length or model.config.max_positions or DEFAULT_WINDOW
        self._end_id, self._bos_id = end_id, bos_id

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        params: Any,
        tokenizer: Tokenizer,
        rules: parallel.Rules | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> "HarnessModel":
        """The model of a checkpoint: its tokenizer's files say what ends a text and what stands before one.

        Raises:
            ValueError: they do not.
        """
        special = special_tokens(checkpoint.folder, tokenizer)
        ends = [special[name] for name in ("eos_token",) if name in special] or checkpoint.eos_token_id
        if not ends:
            raise ValueError(
                f"{checkpoint.folder}: names no eos_token, which stands before a text to be scored"
            )
        options = (special.get("bos_token"), batch_size, rules, max_length)
        return cls(checkpoint.model, params, tokenizer, ends[0], *options)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        dtype: Any = "float32",
        quantize: str | None = None,
        rules: parallel.Rules | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> "HarnessModel":
        """Opens a checkpoint and reads its parameters.

        Args:
            checkpoint: as of `inference.loading.open_checkpoint`.
            dtype, quantize, rules: of its parameters.
            batch_size, max_length: as of the class.

        Raises:
            OSError, ValueError: the checkpoint or its tokenizer is missing or damaged, or names no end of a text.
        """
        opened = open_checkpoint(checkpoint, dtype)
        tokenizer, params = read_tokenizer(opened.folder), opened.read_prepared(rules, quantize)
        return cls.of(opened, params, tokenizer, rules, batch_size, max_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._end_id if self._bos_id is None else self._bos_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness files its cache of requests under."""
        return f"flaxtron-{type(self.model).__name__}-{self.tokenizer.get_vocab_size()}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; what stands before every text is not put there twice."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]) or "\0")
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether each is what the model would have said."""
        passages = []
        for _, context, continuation in requests:
            # What is too long loses its beginning; the last token is scored and not read.
            ids = (context + continuation)[-(self.max_length + 1) :]
            passages.append(Passage(ids, len(ids) - len(continuation)))
        with progress_bar("log-likelihoods", len(passages), not disable_tqdm) as advance:
            scores = score(self.model, self.params, passages, self.batch_size, self.rules, advance)
        return [(float(one.logprobs.sum(dtype=np.float32)), bool(one.is_greedy.all())) for one in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of which none sees another."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in map(utils.make_disjoint_window, parts):
                windows.append((None, *part))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (logprob, _) in zip(owners, found, strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of a request's stop texts."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with progress_bar("generations", len(requests), not disable_tqdm) as advance:
            for numbers in groups.values():
                options = requests[numbers[0]].args[1]
                encoded = {number: self.tok_encode(requests[number].args[0]) for number in numbers}
                order = sorted(numbers, key=lambda number: -len(encoded[number]))
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    rows = [encoded[number] for number in batch]
                    texts |= zip(batch, self._generate(rows, options), strict=True)
                    advance(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, rows: list[list[int]], options: dict[str, Any]) -> list[str]:
        options = dict(options)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        asked = [options.pop(name) for name in names if name in options]
        count = int(next((number for number in asked if number is not None), MAX_NEW_TOKENS))
        if unknown := sorted(set(options) - GENERATION):
            raise ValueError(f"generation option {unknown[0]!r} of a task: known are {sorted(GENERATION)}")
        if not options.get("do_sample"):
            options = {
                name: value for name, value in options.items() if name in ("repetition_penalty", "num_beams")
            }
        if count >= self.max_length:
            raise ValueError(
                f"a task asks for {count} new tokens, which leaves no room in the model's {self.max_length}: "
                "set max_gen_toks"
            )
        rows = [row[-(self.max_length - count) :] for row in rows]
        width = max(map(len, rows))
        ids = np.array([[self._end_id] * (width - len(row)) + row for row in rows])
        mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        config = GenerationConfig(
            max_new_tokens=count,
            eos_token_id=self._end_id,
            stop_strings=tuple(filter(None, until)) or None,
            **options,
        )
        out = generate(self.model, self.params, ids, mask, config, rules=self.rules, tokenizer=self.tokenizer)
        texts = []
        for row in out.sequences[:, width:].tolist():
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            for stop in filter(None, until):
                text = text.split(stop)[0]
            texts.append(text)
        return texts
