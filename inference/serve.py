"""`python -m inference.serve`: a checkpoint behind OpenAI's completions API, read top to bottom.

check the flags -> find the checkpoint -> read the parameters -> compile -> listen -> drain
"""

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from inference.__main__ import user_errors

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that runs Python lets another one on."""
EXAMPLES = """\
Serves a trained or downloaded language model over HTTP, as OpenAI's API for completions.

examples:
  python -m inference.serve --checkpoint runs/quickstart
  python -m inference.serve --checkpoint EleutherAI/gpt-j-6b --rows 16 --max-length 1024
  FLAXTRON_API_KEY=secret python -m inference.serve --checkpoint runs/mine --host 0.0.0.0

Then open http://127.0.0.1:8000/ in a browser, or

  curl http://127.0.0.1:8000/v1/completions -H "content-type: application/json" \\
    -d '{"model": "quickstart", "prompt": "def main(", "max_tokens": 32}'

SIGTERM or Ctrl-C takes no new requests, finishes those under way and ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    checkpoint: str
    """A run's folder (its newest step is taken), one of its checkpoints/STEP, a Hugging Face folder, or a hub id."""
    name: str = ""
    """What clients call the model; by default the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in: set an API key then."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the first line says."""
    rows: int = 8
    """Sequences that are generated at once."""
    max_length: int | None = None
    """Tokens of a prompt and its continuation together; by default the model's window, 2048 at most."""
    max_waiting: int = 256
    """Sequences that may wait for a row; a request past that is told to come back (429)."""
    max_sequences: int = 64
    """Sequences that one request may ask for: prompts x best_of or n."""
    max_body: int = 1 << 20
    """Bytes of a request at most."""
    request_seconds: float = 600.0
    """A request that takes longer, its waiting included, is given up (504)."""
    stall_seconds: float = 30.0
    """A client that sends or reads nothing for so long while it is its turn is dropped."""
    drain_seconds: float = 60.0
    """After SIGTERM, requests under way have so long to finish."""
    api_key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """Key that clients must send; better in the environment, as FLAXTRON_API_KEY, where other users do not see it."""
    prefix_cache: bool = True
    """Take over keys and values of prompts that begin alike."""
    warm_up: bool = True
    """Compile everything before listening; without it the first requests wait for that."""
    mesh: str = ""
    """Devices to spread the model over, such as "tensor=2" or "fsdp=2,tensor=-1" (-1: the rest)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To compute and to keep weights in; auto is float32 on a CPU (by far the fastest), else bfloat16."""
    weights: Literal["full", "int8"] = "full"
    """int8 keeps kernels in 8 bits, with a scale per output channel: half the memory of bfloat16."""
    cache: Literal["full", "int8"] = "full"
    """int8 keeps keys and values of earlier tokens in 8 bits, with a scale per token and head: more rows fit."""
    access_log: bool = False
    """Write a line for every request."""

    def check(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: with the flag and its range.
        """
        at_least = dict(port=0, rows=1, max_waiting=0, max_sequences=1, max_body=1)
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it is at least {low}")
        if self.port > 65535:
            raise ValueError(f"--port {self.port}: it is at most 65535")
        for name in ("request_seconds", "stall_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it is above 0")
        if self.key == "":
            raise ValueError("the API key is empty: leave it out, or set one")

    @property
    def key(self) -> str | None:
        """The API key: of the flag or the environment."""
        return os.environ.get("FLAXTRON_API_KEY") if self.api_key is None else self.api_key


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags and serves.

    Args:
        args: of the command line; None takes the program's own.
    """
    flags = tyro.cli(Flags, args=args, prog="python -m inference.serve", description=EXAMPLES)
    with user_errors():
        run(flags)


def run(flags: Flags) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Raises:
        OSError, ValueError: flags or checkpoint are at fault, the port is taken, or the extra is not installed.
    """
    flags.check()
    try:
        import uvicorn
    except ImportError:
        raise OSError(
            "the server needs fastapi, uvicorn and prometheus-client: pip install 'flaxtron[serve]'"
        ) from None
    import jax

    from inference.api import Server, Settings
    from inference.engine import Engine
    from inference.loading import open_checkpoint, rules_of_mesh
    from inference.text import read_tokenizer
    from inference.watchdog import watching

    started = time.perf_counter()
    rules = rules_of_mesh(flags.mesh)
    rules = None if rules is None else rules.for_decoding()
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = auto if flags.dtype == "auto" else flags.dtype
    checkpoint = open_checkpoint(flags.checkpoint, dtype, cache=flags.cache)
    model, tokenizer = checkpoint.model, read_tokenizer(checkpoint.folder)
    with _listen(flags.host, flags.port) as listening:  # before anything large is read
        params = checkpoint.read_prepared(rules, "int8" if flags.weights == "int8" else None)
        engine = Engine(model, params, flags.rows, flags.max_length, rules, flags.prefix_cache)
        read = time.perf_counter() - started
        if flags.warm_up:
            engine.warm_up()
        # What reading and compiling left behind stays: looking through it again and again would stall every stream.
        gc.collect()
        gc.freeze()
        settings = Settings(
            name=flags.name or _name(flags.checkpoint),
            eos_ids=checkpoint.eos_token_id or (),
            max_waiting=flags.max_waiting,
            max_sequences=flags.max_sequences,
            max_body=flags.max_body,
            request_seconds=flags.request_seconds,
            body_seconds=flags.stall_seconds,
            api_key=flags.key,
        )
        app = Server(engine, tokenizer, settings).app()
        config = uvicorn.Config(
            app,
            http=watching(flags.stall_seconds),
            ws="none",
            log_level="warning" if not flags.access_log else "info",
            access_log=flags.access_log,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(flags.drain_seconds)),
        )
        # uvicorn sends itself the signal again once it has drained, and this is the end that was asked for.
        signal.signal(signal.SIGTERM, lambda *_: None)
        # The engine's thread, which needs microseconds between two steps, else waits for up to 5 ms of other Python.
        sys.setswitchinterval(SWITCH_INTERVAL)
        listening.listen(config.backlog)  # who reads the next line may connect
        address = listening.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        compiled = time.perf_counter() - started - read
        sys.stdout.write(
            f"serving {settings.name} at http://{host}:{address[1]} ({flags.rows} rows of {engine.max_length} tokens;"
            f" reading took {read:.1f} s, compiling {compiled:.1f} s)\n"
        )
        sys.stdout.flush()
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


def _listen(host: str, port: int) -> socket.socket:
    with contextlib.ExitStack() as on_failure:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = on_failure.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        on_failure.pop_all()
        return listening


def _name(checkpoint: str) -> str:
    """The last part of a path that is no step's number."""
    parts = [part for part in checkpoint.rstrip("/").split("/") if part not in ("", ".", "..", "checkpoints")]
    return next((part for part in reversed(parts) if not part.isdigit()), checkpoint)


if __name__ == "__main__":
    main()
