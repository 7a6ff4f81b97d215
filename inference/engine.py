"""Continuous batching: requests join and leave a running batch (Yu et al., 2022, "Orca", OSDI).

    engine = inference.Engine(model, params, num_rows=8)
    request = engine.submit(prompt_ids, inference.SamplingParams(max_new_tokens=64))
    for event in engine.run():
        print(event.request.number, event.token)

The cache has a fixed number of rows. A prompt is read in chunks into an idle row (Agrawal et al., 2023,
arXiv:2308.16369) between two steps of the rows that generate, so that a long prompt does not stall them. A row keeps
its keys and values after its request has ended; a prompt that begins with the same tokens as any row, idle or not,
takes them over.

Steps are handed to the device one ahead of the tokens that are looked at, so that the host's work costs no time.
Not thread-safe; `inference.service` runs one in a thread of its own.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import modelzoo
import parallel
from inference.preparing import prepare
from inference.requests import Event, Request, SamplingParams, TokenLogprob
from inference.row_sampling import MAX_STOPS, Chosen, RowParams
from inference.rows import Row, choose_row, doubled
from inference.slots import Programs, Where
from modelzoo import registry

CHUNKS = (16, 32, 128, 512)
"""Lengths of a prompt's chunks; each is compiled once per length of the cache."""
SHORTEST_CACHE = 256
DEFAULT_MAX_LENGTH = 2048
SHRINK_AFTER = 256
"""Steps for which a shorter cache would have done, before it is made shorter."""
PATIENCE = 1.25
"""Between two steps of generating rows, reading may take so many times as long as a step; one shortest chunk always
may. On a CPU, where 8 rows are a step, 16 tokens take nine tenths of it and 32 tokens one and a half."""


class Engine:
    """See the module.

    Args:
        model: a causal language model.
        params: its parameters: canonical, or prepared (`inference.prepare`).
        num_rows: R, requests that generate at once.
        max_length: of a prompt and its new tokens together; by default the model's window, 2048 at most.
        rules: of a mesh (`parallel.make_rules`), whose data axes divide num_rows; None is one device.
        prefix_cache: take over keys and values of equal beginnings.

    Raises:
        ValueError: the model generates no text, a size that does not fit it, rows that the mesh does not divide, or
            a mesh that splits the sequence or the layers.
    """

    def __init__(
        self,
        model: modelzoo.Model,
        params: Any,
        num_rows: int = 8,
        max_length: int | None = None,
        rules: parallel.Rules | None = None,
        prefix_cache: bool = True,
    ):
        self.max_length, self.vocab_size = (
            _check_sizes(model, num_rows, max_length, rules),
            model.config.vocab_size,
        )
        rules = None if rules is None else rules.for_decoding()
        self.num_rows = num_rows
        self._lengths = doubled(min(SHORTEST_CACHE, self.max_length), self.max_length)
        self._chunks = [size for size in CHUNKS if size <= self._lengths[0]] or [self._lengths[0]]
        self._programs, self._params = Programs(model, rules), prepare(model, params, rules)
        self._state = self._programs.init(self._params, num_rows, self._lengths[0])
        self._row_params, self._placed_params = RowParams.neutral(num_rows), None
        self._rows = [Row(number) for number in range(num_rows)]
        self._waiting: deque[Request] = deque()
        self._reading: Row | None = None
        self._pending: deque[tuple[list[tuple[int, Request]], Chosen]] = deque()
        self._scored: dict[Request, list[tuple[int, Chosen]]] = {}
        self._ended: list[Event] = []
        self._seconds: dict[int, float] = {}  # of a chunk by its length, and of a step by 0
        self._num_requests = self._num_roomy_steps = 0
        self._prefix_cache = prefix_cache

    @property
    def num_waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return sum(row.request is not None for row in self._rows)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._waiting or self._pending or self._ended or self.num_running)

    def submit(self, prompt: Sequence[int], params: SamplingParams = SamplingParams()) -> Request:  # noqa: B008
        """Takes a request in; it begins when a row is idle.

        Args:
            prompt: token ids, at least one.
            params: how to continue it.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, or more tokens than `max_length`.
        """
        self.check(prompt, params)
        request = Request(self._num_requests, tuple(int(token) for token in prompt), params)
        self._num_requests += 1
        self._waiting.append(request)
        return request

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Whether the engine takes such a request; changes nothing, so any thread may ask.

        Raises:
            ValueError: as `submit`.
        """
        if not len(prompt):
            raise ValueError("the prompt is empty: generation continues a text of one token or more")
        named = dict(prompt=prompt, stop_token_ids=params.stop_token_ids, logit_bias=params.logit_bias)
        for name, ids in named.items():
            outside = next((token for token in ids if not 0 <= token < self.vocab_size), None)
            if outside is not None:
                raise ValueError(
                    f"{name} holds the id {outside}: the vocabulary has ids 0 to {self.vocab_size - 1}"
                )
        if len(params.stop_token_ids) > MAX_STOPS:
            raise ValueError(
                f"stop_token_ids names {len(params.stop_token_ids)} ids: {MAX_STOPS} are allowed"
            )
        if len(prompt) + params.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {params.max_new_tokens} new ones are past the "
                f"{self.max_length} tokens of a request: shorten one of them"
            )

    def cancel(self, request: Request) -> None:
        """Ends a request wherever it is; its last event says "cancelled". One that has ended stays as it is."""
        if request.finish_reason is None:
            if request in self._waiting:
                self._waiting.remove(request)
            self._finish(request, "cancelled")
            self._ended.append(Event(request, None, finish_reason="cancelled"))

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left, and yields every event."""
        while not self.is_idle:
            yield from self.step()

    def step(self) -> list[Event]:
        """Hands the device its next work and returns what the work before has given."""
        before = len(self._pending)
        self._read()
        if any(row.is_active for row in self._rows):
            self._decode()
        events, self._ended = self._ended, []
        for _ in range(before or len(self._pending)):
            events += self._collect(*self._pending.popleft())
        return events

    def warm_up(self, scoring: bool = False) -> float:
        """Compiles every program before the first request needs it, and times those that `step` chooses among.

        Args:
            scoring: also what requests with `prompt_logprobs` need.

        Returns:
            Seconds that it took.
        """
        assert self.is_idle, "warm up before the first request"
        started = time.perf_counter()
        idle = Where(*(np.zeros(self.num_rows, dtype) for dtype in (np.int32, np.int32, bool)))
        for length in self._lengths:
            self._resize(length)
            for size in self._chunks:
                ids, place = np.zeros(size + 1, np.int32), np.array([0, 0, size, 0], np.int32)
                for score in (True, False) if scoring else (False,):
                    self._seconds[size] = _time(lambda: self._launch_read(ids, place, score))  # noqa: B023
            self._seconds[0] = _time(lambda: self._launch_decode(idle))
            self._state = self._programs.copy(self._state, 0, 0)
        self._state = self._programs.remember(self._state, 0, np.zeros(self.vocab_size, bool))
        self._resize(self._lengths[0])
        return time.perf_counter() - started

    def _read(self) -> None:
        """Launches the next chunks of prompts: as many as stall nobody for long."""
        budget = PATIENCE * self._seconds.get(0, 0.0)
        busy = any(row.is_active for row in self._rows)
        while True:
            if self._reading is None:
                self._start_next()
            if self._reading is None:
                return
            rest = len(self._reading.request.prompt) - self._reading.index  # pyright: ignore[reportOptionalMemberAccess]
            size = next((size for size in self._chunks if size >= rest), self._chunks[-1])
            if busy:  # the longest that the budget allows, or the shortest
                quick = [s for s in self._chunks if self._seconds.get(s, math.inf) <= budget]
                size = min(size, (quick or self._chunks)[-1 if quick else 0])
            self._read_chunk(self._reading, size)
            budget -= self._seconds.get(size, math.inf)
            if not busy or self._seconds.get(self._chunks[0], math.inf) > budget:
                return

    def _start_next(self) -> None:
        """Gives the first waiting request a row, if one is idle."""
        if not self._waiting:
            return
        share = self._prefix_cache and not self._waiting[0].params.prompt_logprobs
        found = choose_row(self._rows, self._waiting[0].prompt, share)
        if found is None:
            return
        request, (row, source, num_held) = self._waiting.popleft(), found
        if source is not None:
            self._state = self._programs.copy(self._state, source.number, row.number)
        row.take(request, num_held)
        request.cached_tokens, self._reading = num_held, row
        self._row_params.set(row.number, request.params)
        self._placed_params = None
        if request.params.reads_history:
            seen = np.zeros(self.vocab_size, bool)
            seen[list(request.prompt)] = True
            self._state = self._programs.remember(self._state, row.number, seen)

    def _read_chunk(self, row: Row, size: int) -> None:
        """Launches the next chunk of a row's prompt; after the last one the row generates."""
        request = row.request
        assert request is not None
        self._make_room(min(row.index + size, len(request.prompt)) + 1)
        # A chunk that would pass the cache's end begins earlier, and reads some tokens again.
        start = min(row.index, self._state.num_slots - size)
        count = min(len(request.prompt) - start, size)
        is_last = start + count == len(request.prompt)
        ids = np.zeros(size + 1, np.int32)
        following = request.prompt[start : start + count + 1]
        ids[: len(following)] = following
        place = np.array([row.number, start, count, is_last], np.int32)
        chosen, scored = self._launch_read(ids, place, request.params.prompt_logprobs)
        if scored is not None:
            self._scored.setdefault(request, []).append((start, scored))
        row.index = start + count
        if is_last:
            row.is_reading, self._reading, row.step = False, None, 1
            self._pending.append(([(0, request)], chosen))

    def _decode(self) -> None:
        """Launches one step of all rows that generate."""
        self._make_room(max(row.index for row in self._rows if row.request is not None) + 1)
        active = [row for row in self._rows if row.is_active]
        where = Where(
            # A row that does not generate writes behind what it holds.
            np.array([min(row.index, self._state.num_slots - 1) for row in self._rows], np.int32),
            np.array([row.step for row in self._rows], np.int32),
            np.array([row.is_active for row in self._rows]),
        )
        chosen = self._launch_decode(where)
        self._pending.append(([(row.number, row.request) for row in active if row.request], chosen))
        for row in active:
            row.index, row.step = row.index + 1, row.step + 1

    def _launch_read(self, ids: np.ndarray, place: np.ndarray, score: bool) -> tuple[Chosen, Chosen | None]:
        params = self._place_params()
        self._state, chosen, scored = self._programs.read(
            self._params, self._state, params, ids, place, score
        )
        return chosen, scored

    def _launch_decode(self, where: Where) -> Chosen:
        self._state, chosen = self._programs.decode(self._params, self._state, self._place_params(), where)
        return chosen

    def _place_params(self) -> Any:
        """The rows' parameters on the device, copied there when they have changed."""
        if self._placed_params is None:
            # Copies: the device may read a numpy array after the host has changed it.
            self._placed_params = jax.tree.map(lambda a: jax.numpy.array(a, copy=True), self._row_params)
        return self._placed_params

    def _collect(self, rows: list[tuple[int, Request]], chosen: Chosen) -> list[Event]:
        """Takes a step's tokens from the device: (place among them, request) for each that has one."""
        tokens, logprobs = np.asarray(chosen.token), np.asarray(chosen.logprob)
        tops = None
        if any(request.params.logprobs for _, request in rows):
            tops = np.asarray(chosen.top_ids), np.asarray(chosen.top_logprobs)
        events = []
        for i, request in rows:
            if request.finish_reason is not None:  # it ended while this step was under way
                continue
            self._note_prompt(request)
            params, token, detail, reason = request.params, None, None, None
            if params.max_new_tokens:
                token = int(tokens[i])
                request.output.append(token)
                if params.logprobs is not None:
                    detail = _detail(token, logprobs[i], tops, i, params.logprobs)
                reason = "stop" if token in params.stop_token_ids else None
            if reason is None and len(request.output) == params.max_new_tokens:
                reason = "length"
            if reason is not None:
                self._finish(request, reason)
            events.append(Event(request, token, detail, reason))
        return events

    def _note_prompt(self, request: Request) -> None:
        """Takes the prompt's log-probabilities from the device, when its last chunk has been read."""
        count = request.params.logprobs or 0
        for start, scored in self._scored.pop(request, ()):
            ids, logprobs = request.prompt[start + 1 :], np.asarray(scored.logprob)
            tops = np.asarray(scored.top_ids), np.asarray(scored.top_logprobs)
            again = len(request.prompt_logprobs) - start  # of tokens that were read twice
            for i in range(again, min(len(ids), len(logprobs))):
                request.prompt_logprobs.append(_detail(ids[i], logprobs[i], tops, i, count))

    def _finish(self, request: Request, reason: str) -> None:
        """Ends a request and frees its row, unless another has taken that already."""
        request.finish_reason = reason
        self._scored.pop(request, None)
        for row in self._rows:
            if row.request is request:
                self._reading = None if row is self._reading else self._reading
                row.leave(self._state.num_slots - 1)
                # Idle, it asks for nothing: what no row asks for is not computed.
                self._row_params.set(row.number, SamplingParams())
                self._placed_params = None

    def _make_room(self, needed: int) -> None:
        """Makes the cache as long as the next step needs, or shorter when it has been too long for long."""
        longest = max([needed, *(row.index + 1 for row in self._rows if row.request is not None)])
        length = next((length for length in self._lengths if length >= longest), self.max_length)
        if length > self._state.num_slots:
            self._resize(length)
        self._num_roomy_steps = self._num_roomy_steps + 1 if length < self._state.num_slots else 0
        if self._num_roomy_steps >= SHRINK_AFTER:
            self._resize(length)

    def _resize(self, length: int) -> None:
        self._num_roomy_steps = 0
        if length != self._state.num_slots:
            self._state = self._programs.resize(self._state, length)
            for row in self._rows:
                if row.request is None:
                    row.leave(length - 1)


def _check_sizes(
    model: modelzoo.Model, num_rows: int, max_length: int | None, rules: parallel.Rules | None
) -> int:
    """The length of the longest request; see `Engine`."""
    if model.task != "causal_lm":
        others = registry.relatives(type(model), ("causal_lm",))
        raise ValueError(f"{type(model).__name__} does not generate text: take {others}")
    window, shards = model.config.max_positions, 1 if rules is None else rules.num_shards("act_batch")
    if num_rows < 1 or num_rows % shards:
        raise ValueError(
            f"num_rows = {num_rows}: it is a positive multiple of {shards}, the mesh's data shards"
        )
    default = DEFAULT_MAX_LENGTH if window is None else min(window, DEFAULT_MAX_LENGTH)
    length = default if max_length is None else max_length
    if length < 2 or (window is not None and length > window):
        raise ValueError(f"max_length = {length}: it is from 2 to the model's {window} positions")
    return length


def _time(launch: Callable[[], Any]) -> float:
    """Seconds of a launch: the faster of two after one that compiles."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(launch())
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _detail(token: int, logprob: Any, tops: Any, i: int, count: int) -> TokenLogprob:
    top: Iterable[tuple[int, float]] = ()
    if count:
        top = zip(tops[0][i][:count].tolist(), tops[1][i][:count].tolist(), strict=True)
    return TokenLogprob(int(token), float(logprob), tuple(top))
