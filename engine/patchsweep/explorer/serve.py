"""The explorer's server: loopback alone, and only for who has the address with its key.

A page of another site must not drive it. The key is part of every path; the `Host` of a request
must be this machine's (a name that was made to point here is none), its `Origin` this server's; and
what changes anything must be JSON, which no other site can send without being asked first.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ConfigError, PatchsweepError
from patchsweep.explorer.cells import Place
from patchsweep.explorer.page import build, failure
from patchsweep.explorer.question import Question
from patchsweep.explorer.runs import Explorer, Run

HOST = "127.0.0.1"
_MOST_BYTES = 1 << 20  # of a question
_POLL_S = 0.03  # between two looks at a run's events
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(
    model: TransformerBridge, name: str, port: int, say: Callable[[str], None] = print
) -> None:
    """Serve the explorer of `model` until it is interrupted; `name` is what commands call it.

    `say` gets the address to open. Port 0 is any free one.

    Raises:
        ConfigError: the port is taken.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port={port} cannot be opened ({error.strerror}); leave it out for a free one"
            ) from error
        port = listening.getsockname()[1]
        key = secrets.token_urlsafe(24)
        explorer = Explorer(model, name)
        try:
            server = uvicorn.Server(
                uvicorn.Config(
                    app_of(explorer, key, port),
                    log_level="warning",
                    lifespan="off",
                    timeout_graceful_shutdown=1,
                )
            )
            say(f"http://{HOST}:{port}/{key}/")
            server.run(sockets=[listening])
        finally:
            explorer.close()


def app_of(explorer: Explorer, key: str, port: int) -> Any:
    """Return the ASGI application, whose paths all begin with `key`."""
    api = _Api(explorer)
    routes = [
        Route("/", api.page),
        Route("/check", api.check, methods=["POST"]),
        Route("/runs", api.ask, methods=["POST"]),
        Route("/runs/{number:int}/events", api.events),
        Route("/runs/{number:int}/report", api.report),
        Route("/runs/{number:int}/cell/{kind}", api.cell),
    ]
    return _Guard(Starlette(routes=[Mount(f"/{key}", routes=routes)]), port)


class _Guard:
    """Refuses requests that do not come from the explorer's own page or from a person."""

    def __init__(self, app: Any, port: int) -> None:
        self._app = app
        self._hosts = {f"{host}:{port}" for host in (HOST, "localhost")}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None:
            await Response(refusal[1], refusal[0], _HEADERS)(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self._app(scope, receive, with_headers)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Return the status and the text of a refusal; None: the request may pass."""
        host = request.headers.get("host", "")
        if host not in self._hosts:
            return 403, "this host is not the explorer's"
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "this origin is not the explorer's"
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip()
            if kind != "application/json":
                return 415, "a question is JSON"
        return None


class _Api:
    """What the page asks of the server."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer

    async def page(self, request: Request) -> Response:
        return HTMLResponse(build(self._explorer.model, self._explorer.name))

    async def check(self, request: Request) -> Response:
        """Answer with the pair's tokens and the sweep's cost, or with the mistake in it."""
        return await self._answer(request, self._checked)

    async def ask(self, request: Request) -> Response:
        """Start a run, and answer with its number and how to run it elsewhere."""
        return await self._answer(request, self._asked)

    async def events(self, request: Request) -> Response:
        """Stream the events of a run, as they come, to the end."""
        try:
            run = self._run(request)
        except ConfigError as error:
            return JSONResponse({"error": str(error)}, 404)
        seen = request.headers.get("last-event-id", "0")
        first = int(seen) if seen.isdecimal() else 0
        return StreamingResponse(_stream(request, run, first), media_type="text/event-stream")

    async def report(self, request: Request) -> Response:
        return await self._html(lambda: self._run(request).report())

    async def cell(self, request: Request) -> Response:
        kind = request.path_params["kind"]
        return await self._html(
            lambda: self._explorer.cell(
                self._run(request), kind, Place.of(dict(request.query_params))
            )
        )

    def _run(self, request: Request) -> Run:
        return self._explorer.run_of(int(request.path_params["number"]))

    def _checked(self, question: Question) -> dict[str, Any]:
        pairs = question.pairs(self._explorer.model)
        plans = question.request(self._explorer.model, pairs).plans
        return {
            "tokens": pairs._repr_html_(),
            "n_tokens": len(pairs[0]),
            "n_patches": sum(plan.n_patches for plan in plans),
            "n_live": sum(plan.n_live for plan in plans),
        }

    def _asked(self, question: Question) -> dict[str, Any]:
        run = self._explorer.ask(question)
        name = self._explorer.name
        return {
            "run": run.number,
            "command": question.command(name),
            "python": question.python(name),
        }

    async def _answer(
        self, request: Request, answer: Callable[[Question], dict[str, Any]]
    ) -> Response:
        try:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    raise ConfigError(f"a question has {_MOST_BYTES:,} bytes at most; shorten it")
            question = Question.of(_parsed(body))
            return JSONResponse(await run_in_threadpool(answer, question))
        except PatchsweepError as error:
            return JSONResponse({"error": str(error)}, 400)

    async def _html(self, make: Callable[[], str]) -> Response:
        try:
            return HTMLResponse(await run_in_threadpool(make))
        except PatchsweepError as error:
            return HTMLResponse(failure(str(error)), 400)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:  # also of text that is no UTF-8
        raise ConfigError(f"a question is JSON, and this is none: {error}") from error


async def _stream(request: Request, run: Run, seen: int) -> AsyncIterator[str]:
    """Yield the events of `run` from number `seen` on as server-sent events."""
    while True:
        closed = run.closed  # read first: what was told before it is in `events`
        for number, event in run.after(seen):
            seen = number
            yield f"id: {number}\ndata: {json.dumps(event, allow_nan=False)}\n\n"
        if closed or await request.is_disconnected():
            return
        await asyncio.sleep(_POLL_S)
