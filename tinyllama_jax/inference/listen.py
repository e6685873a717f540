"""uvicorn: closes connections that send or read too slowly, and ends open answers when the server is told to stop."""

import asyncio

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.inference.server import PATIENCE, Service, application

CONNECTIONS = 512  # at once, at most: 512 MiB of bodies


class Connection(H11Protocol):
    """A connection that is closed if the head of a request takes long, or if the client does not take what is sent."""

    _timer = _stalled = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def _wait(self) -> None:
        """Closes the connection after PATIENCE seconds, unless a request is being answered by then."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._timer = self._timer and self._timer.cancel()
        elif not self._timer:
            self._timer = self.loop.call_later(PATIENCE, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = self._stalled and self._stalled.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in filter(None, (self._timer, self._stalled)):
            timer.cancel()


class Server(uvicorn.Server):
    """Ends open answers when it is told to stop."""

    def __init__(self, service: Service, engine: Engine):
        self.service, self._engine = service, engine
        super().__init__(
            uvicorn.Config(
                application(service),
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=int(PATIENCE),
                timeout_graceful_shutdown=3,
            )
        )

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        self.service.start(self._engine)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: True ends the server."""
        return await super().on_tick(counter) or self.service.state == "failed"

    async def shutdown(self, sockets: list | None = None) -> None:
        self.service.stop()
        await super().shutdown(sockets)
