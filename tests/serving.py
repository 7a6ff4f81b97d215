"""A server in a thread of this process, on a port of its own, over an engine without a model."""

import contextlib
import threading
import time

import uvicorn

from inference.api import Server, Settings
from inference.watchdog import watching
from tests.fake_engine import FakeEngine
from tests.small_tokenizers import byte_level

KEY = "sesame"


@contextlib.contextmanager
def serving(engine=None, stall=5.0, **settings):
    """Yields (address, the engine, the Server)."""
    engine = engine or FakeEngine(vocab_size=290)
    ours = Server(engine, byte_level(), Settings(**{"name": "tiny", "eos_ids": (0,), **settings}))
    config = uvicorn.Config(
        ours.app(), port=0, http=watching(stall), ws="none", log_level="critical", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine, ours
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds=10.0):
    """Waits for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)
