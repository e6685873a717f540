"""The HTTP server: one engine for many clients, OpenAI's API, and a page to chat with. All that a client can use is bounded."""

import asyncio
import ipaddress
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.values import shown
from tinyllama_jax.data import chat
from tinyllama_jax.inference import answers, openai, web
from tinyllama_jax.inference.answers import Choice, Piece
from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.inference.openai import ApiError, Query
from tinyllama_jax.inference.weights import Loaded
from tinyllama_jax.inference.worker import Worker

BODY = 1 << 20  # the most bytes of a request's body
PATIENCE = 10.0  # seconds that a client has to send a head or a body, or to read


class Options(NamedTuple):
    """How to serve."""

    name: str  # of the model
    template: chat.Template | None
    slots: int  # requests that run at once
    queue: int  # the most requests that wait
    max_tokens: int  # the most tokens of an answer
    hosts: tuple[str, ...] = ()  # this server's names, besides addresses and localhost
    origins: tuple[str, ...] = ()  # other origins whose pages may use it


# -- one request -------------------------------------------------------------------------------------------------------


class Gone(Exception):
    """The client has closed the connection."""


class Answer:
    """The response to one HTTP request: follows its answers in the engine until they end or the client disconnects."""

    def __init__(self, service: "Service", query: Query):
        self._service, self._query = service, query
        context = service.loaded.model.seq_len
        requests = query._replace(max_tokens=min(query.max_tokens, service.options.max_tokens)).requests(context)
        self.choices = [Choice(i, request, query, service.loaded.tokenizer) for i, request in enumerate(requests)]
        self._events: asyncio.Queue = asyncio.Queue()
        self._head = {
            "id": ("chatcmpl-" if query.chat else "cmpl-") + uuid.uuid4().hex,
            "object": answers.kind(query),
            "created": int(time.time()),
            "model": service.options.name,
        }

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        gone, started = asyncio.ensure_future(self._watch(receive)), False
        try:
            self._service.open(self)
            await self._next()  # the engine has accepted it
            if self._query.stream:
                started = True
                await self._stream(send)
            else:
                pieces = [Piece()] * len(self.choices)
                async for i, piece in self._pieces():
                    pieces[i] += piece
                choices = [answers.choice(self._query, i, piece) for i, piece in enumerate(pieces)]
                body = self._head | {"choices": choices, "usage": answers.usage(self._query, self.choices)}
                await Response(answers.encode(body), media_type="application/json")(scope, receive, send)
        except Gone:
            self._service.counts["cancelled"] += 1
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": answers.event(error.body())})  # and no [DONE]
        finally:
            gone.cancel()
            self._service.close(self)

    async def _watch(self, receive: Callable) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._service.worker.cancel([c.request for c in self.choices])  # at once, whatever else waits in the event loop
        self.end(Gone())

    def notify(self, *event: object) -> None:
        """Takes the worker's reports, in the event loop. See `worker.Notify`."""
        self._events.put_nowait(event)

    def end(self, error: Exception) -> None:
        """Ends the answer with an error."""
        self._events.put_nowait((error, 0, None))

    async def _next(self) -> tuple[int | None, int, str | None]:
        which, n, finish = await self._events.get()
        if isinstance(which, UserError):
            raise ApiError(400, str(which), code="invalid_value")
        if isinstance(which, Exception) and not isinstance(which, (Gone, ApiError)):
            raise ApiError(500, f"the engine failed: {which}", code="engine_failed")
        if isinstance(which, Exception):
            raise which
        return which, n, finish

    async def _pieces(self):
        """Yields (number of the answer, new piece of it) until all answers have ended."""
        while any(c.finish is None for c in self.choices):
            i, n, finish = await self._next()
            choice = self.choices[i]
            before = choice.n_tokens
            piece = choice.take(n, finish)
            self._service.counts["completion_tokens"] += choice.n_tokens - before
            if choice.finish and not finish:  # at a stop string
                self._service.worker.cancel([choice.request])
            if piece != Piece():
                yield i, piece

    async def _stream(self, send: Callable) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        headers += [(b"x-accel-buffering", b"no")]  # nginx: pass each event on
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        more = {"usage": None} if self._query.usage else {}
        data = lambda body: send({"type": "http.response.body", "body": body, "more_body": True})
        begun = set()
        async for i, piece in self._pieces():
            choices = [answers.choice(self._query, i, piece, first=i not in begun)]
            begun.add(i)
            await data(answers.event(self._head | {"choices": choices} | more))
        if self._query.usage:
            await data(answers.event(self._head | {"choices": [], "usage": answers.usage(self._query, self.choices)}))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


# -- the service -------------------------------------------------------------------------------------------------------


class Service:
    """What all requests share: the model, the worker with the engine, and the open requests. Lives in the event loop."""

    def __init__(self, loaded: Loaded, options: Options):
        self.loaded, self.options, self.worker = loaded, options, None
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._open: set[Answer] = set()
        self._stopping, self._started = False, int(time.time())

    @property
    def state(self) -> str:
        """One of: ready, warming up, shutting down, failed."""
        if self._stopping:
            return "shutting down"
        if self.worker is None or not self.worker.ready:
            return "failed" if self.worker and self.worker.failed else "warming up"
        return "ready"

    def start(self, engine: Engine) -> None:
        """Starts the engine's thread."""
        self.worker = Worker(engine, asyncio.get_running_loop())
        self.worker.start()

    def stop(self) -> None:
        """Ends every answer, and the engine's thread after its current step."""
        self._stopping = True
        for answer in self._open:
            answer.end(ApiError(503, "the server is shutting down", code="shutting_down", retry=5))
        self.worker.stop()

    def open(self, answer: Answer) -> None:
        """Passes an answer's requests to the engine. Raises ApiError if the queue is full."""
        n, running = len(answer.choices), self.n_open
        if self.state != "ready":
            raise ApiError(503, f"the server is {self.state}", code="not_ready", retry=5)
        if running + n > self.options.slots + self.options.queue:
            what = f"{running} requests are running or waiting, and {self.options.slots + self.options.queue} is the most"
            raise ApiError(503, f"{what}; try again later", code="queue_full", retry=1 + running // self.options.slots)
        self._open.add(answer)
        self.counts["prompt_tokens"] += sum(len(c.request.prompt) for c in answer.choices)
        self.worker.submit([c.request for c in answer.choices], answer.notify)

    def close(self, answer: Answer) -> None:
        """Takes the requests of an answer from the engine if they still run."""
        if answer in self._open:
            self._open.remove(answer)
            self.worker.cancel([c.request for c in answer.choices])
            self.counts["cached_tokens"] += sum(c.request.cached for c in answer.choices)

    @property
    def n_open(self) -> int:
        """Requests of the engine that have not ended."""
        return sum(c.finish is None for answer in self._open for c in answer.choices)

    async def complete(self, request: Request) -> Awaitable | Response:
        """POST /v1/chat/completions and /v1/completions."""
        kind = openai.Chat if request.url.path.endswith("/chat/completions") else openai.Completion
        body = await _body(request)
        try:  # on another thread: a long prompt would keep the streams of the others waiting
            query = await asyncio.to_thread(openai.parse, body, kind, self.loaded, self.options.template)
        except UserError as error:
            raise ApiError(400, str(error), "messages" if kind is openai.Chat else "prompt", "invalid_value") from None
        self._check(query)
        return Answer(self, query)

    def _check(self, query: Query) -> None:
        context, longest = self.loaded.model.seq_len, max(map(len, query.prompts))
        name = "messages" if query.chat else "prompt"
        if longest > (most := context - (query.max_tokens > 0)):
            what = f"{name}: has {longest:,} tokens, and the model's context is {context:,}; shorten it to {most:,} or fewer"
            raise ApiError(400, what, name, "context_length_exceeded")
        most = self.options.slots + self.options.queue
        if query.n * len(query.prompts) > most:
            what = f"n: asks for {query.n * len(query.prompts)} answers at once, and the most is {most}"
            raise ApiError(400, what, "n", "invalid_value")
        if query.model not in ("", self.options.name):
            what = f"model: {shown(query.model)!r} is not served; the model here is {self.options.name!r}"
            raise ApiError(404, what, "model", "model_not_found")

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/NAME; `context` and `chat` are not OpenAI's."""
        one = {"id": self.options.name, "object": "model", "created": self._started, "owned_by": "tinyllama_jax"}
        one |= {"context": self.loaded.model.seq_len, "chat": self.options.template is not None}
        if (name := request.path_params.get("name")) not in (None, self.options.name):
            raise ApiError(404, f"the model {shown(name)!r} does not exist", "model", "model_not_found")
        return _json(one if name else {"object": "list", "data": [one]})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 if it takes requests, otherwise 503."""
        return _json({"status": self.state}, 200 if self.state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        n_open = self.n_open
        running = min(n_open, self.options.slots)
        lines = [f"serve_ready {int(self.state == 'ready')}", f"serve_slots {self.options.slots}"]
        lines += [f"serve_requests_running {running}", f"serve_requests_waiting {n_open - running}"]
        lines += [f'serve_responses_total{{status="{status}"}} {n}' for status, n in sorted(self.statuses.items())]
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "cancelled"):
            lines += [f"serve_{name}_total {self.counts[name]}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _body(request: Request) -> bytes:
    out = bytearray()
    too_large = ApiError(413, f"the body has more than {BODY:,} bytes", code="body_too_large")
    if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > BODY:
        raise too_large
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                out += chunk
                if len(out) > BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {PATIENCE:g} seconds", code="timeout") from None
    return bytes(out)


def _json(value: dict, status: int = 200, headers: dict | None = None) -> Response:
    return Response(answers.encode(value), status, headers, "application/json")


# -- the application ---------------------------------------------------------------------------------------------------


class Guard:
    """Refuses requests that another site's page makes: by Host (a name that somebody pointed at this server) or by Origin."""

    def __init__(self, app: Callable, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, options = {name: value.decode("latin-1") for name, value in scope["headers"]}, self._service.options
        host, origin, cors = headers.get(b"host", ""), headers.get(b"origin"), ()
        allowed = origin is not None and ("*" in options.origins or origin in options.origins)
        if allowed:
            asked = headers.get(b"access-control-request-headers", "content-type").encode("latin-1")
            cors = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
            cors += [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-allow-headers", asked)]

        async def counted_send(message: dict) -> None:
            if message["type"] == "http.response.start":
                self._service.statuses[message["status"]] += 1
                message["headers"] = [*message["headers"], *cors, (b"x-content-type-options", b"nosniff")]
            await send(message)

        if not known_host(host, options.hosts):
            error = ApiError(403, f"Host {shown(host)!r} is not a name of this server; serve --allow-host NAME allows it")
        elif not allowed and (origin is not None and origin.partition("://")[2] != host):
            error = ApiError(403, f"Origin {shown(origin)!r} is another page; serve --allow-origin ORIGIN allows it")
        elif origin is None and scope["method"] == "POST" and headers.get(b"sec-fetch-site") in ("cross-site", "same-site"):
            error = ApiError(403, "a page of another site sent this request, without an Origin header that could allow it")
        elif allowed and scope["method"] == "OPTIONS":
            await Response(status_code=204)(scope, receive, counted_send)
            return
        else:
            await self._app(scope, receive, counted_send)
            return
        error.code = "forbidden"
        await _json(error.body(), error.status)(scope, receive, counted_send)


def known_host(host: str, names: tuple[str, ...]) -> bool:
    """Whether a Host header names this server. An address does: only a name can be pointed here by somebody else."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name in ("localhost", *names) or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    headers = dict(getattr(error, "headers", None) or {})  # with 405: which methods are allowed
    if isinstance(error, HTTPException):
        code = "not_found" if error.status_code == 404 else "method_not_allowed"
        error = ApiError(error.status_code, f"{request.method} {shown(request.url.path)}: {error.detail}", code=code)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "an error of the server's own; its log has more", code="internal_error")
    if error.retry:
        headers["retry-after"] = str(error.retry)
    return _json(error.body(), error.status, headers)


def page() -> Response:
    """The page at /. Its policy lets it run its own script alone, and connect to this server alone."""
    text = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; connect-src 'self'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" + web.policy(text)
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-store"}
    return HTMLResponse(text, headers=headers)


def application(service: Service) -> Callable:
    """The ASGI application."""
    whole = page()

    async def root(request: Request) -> Response:
        return whole

    routes = [
        Route("/", root),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/chat/completions", service.complete, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
    ]
    handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), _error)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), service)
