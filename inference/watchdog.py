"""HTTP connections that may not stay open for nothing: uvicorn's protocol with an eye on clients that stall.

uvicorn bounds how long a connection may idle between two requests; it waits without end for the rest of a request's
head or body, and for a client that does not read what it asked for.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

STALL_SECONDS = 30.0


class WatchedProtocol(H11Protocol):
    """Drops a connection that has made no progress between two looks at it, `stall_seconds` apart.

    A request that waits for its answer is no stall, however long it takes; an answer of which nothing could be written
    is, as is a head or a body of which the rest does not come.
    """

    stall_seconds = STALL_SECONDS

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen: Any = None
        self._watch = self.loop.call_later(self.stall_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        state = self._state()
        if state is not None and state == self._seen:
            # Not close(), which would wait for the client to take what is still to be written.
            self.transport.abort()
            return
        self._seen = state
        self._watch = self.loop.call_later(self.stall_seconds, self._look)

    def _state(self) -> tuple[Any, ...] | None:
        """What must change from look to look, or None while the client owes nothing."""
        if self.flow.write_paused:
            return ("reads nothing", _unwritten(self.transport))
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return ("sends no request", id(cycle))
        return ("sends no body", id(cycle), len(cycle.body)) if cycle.more_body else None


def _unwritten(transport: Any) -> int:
    return transport.get_write_buffer_size() if isinstance(transport, asyncio.WriteTransport) else 0


def watching(seconds: float) -> type[WatchedProtocol]:
    """The protocol with another patience."""
    return type("WatchedProtocol", (WatchedProtocol,), {"stall_seconds": seconds})
