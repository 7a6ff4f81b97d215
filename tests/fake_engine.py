"""An engine without a model, for what stands on top of one: its tokens are the prompt's, over and over."""

import math
import time

from inference.requests import Event, Request, TokenLogprob


class FakeEngine:
    """One row a request; every step gives each running request its next token."""

    def __init__(self, num_rows=2, seconds=0.0, vocab_size=300, max_length=10_000):
        self.num_rows, self.vocab_size, self.max_length = num_rows, vocab_size, max_length
        self.seconds, self.waiting, self.running, self.ended = seconds, [], [], []
        self.num_submitted = 0
        self.failure: Exception | None = None

    num_waiting = property(lambda self: len(self.waiting))
    num_running = property(lambda self: len(self.running))
    is_idle = property(lambda self: not (self.waiting or self.running or self.ended))

    def check(self, prompt, params):
        if not prompt:
            raise ValueError("the prompt is empty: generation continues a text of one token or more")
        if len(prompt) + params.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and more are past the {self.max_length} tokens"
            )

    def submit(self, prompt, params):
        request = Request(self.num_submitted, tuple(prompt), params)
        self.num_submitted += 1
        self.waiting.append(request)
        return request

    def cancel(self, request):
        if request.finish_reason is None:
            (self.waiting if request in self.waiting else self.running).remove(request)
            request.finish_reason = "cancelled"
            self.ended.append(Event(request, None, finish_reason="cancelled"))

    def step(self):
        time.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        events, self.ended = self.ended, []
        while self.waiting and len(self.running) < self.num_rows:
            self.running.append(self.waiting.pop(0))
        for request in list(self.running):
            params = request.params
            if params.prompt_logprobs and not request.prompt_logprobs:
                request.prompt_logprobs += [self.detail(token, params) for token in request.prompt[1:]]
            token = request.prompt[len(request.output) % len(request.prompt)]
            if params.max_new_tokens == 0:
                token = None
            else:
                request.output.append(token)
            reason = "stop" if token in params.stop_token_ids else None
            if reason is None and len(request.output) == params.max_new_tokens:
                reason = "length"
            if reason is not None:
                request.finish_reason = reason
                self.running.remove(request)
            detail = None if params.logprobs is None or token is None else self.detail(token, params)
            events.append(Event(request, token, detail, reason))
        return events

    def detail(self, token, params):
        """Half for the token, a quarter for the next id, ..."""
        top = tuple((token + i, -math.log(2) * (i + 1)) for i in range(params.logprobs))
        return TokenLogprob(token, -math.log(2) * (1 + params.sample), top)
