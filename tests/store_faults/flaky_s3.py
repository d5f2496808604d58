"""A local S3 server (moto) that fails on demand: errors, throttling, timeouts, lost answers."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Start = Callable[..., Any]
KINDS = ("500", "503", "timeout", "lost answer")
TIMEOUT_S = 1.0  # the clients of these tests wait for less


class FlakyS3:
    """Every `every`-th request fails, each time in the next of the ways `KINDS`."""

    def __init__(self) -> None:
        self.every: int | None = None  # None: no request fails; 1: each one does
        self.kinds: tuple[str, ...] = KINDS
        self.failed: Counter[str] = Counter()
        self.n_requests = 0
        self.n_writes = 0  # PUT, POST and DELETE among them
        self.url = ""
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock, self._turn = threading.Lock(), itertools.count()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        with self._lock:
            self.n_requests += 1
            self.n_writes += environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
            kind = None
            if self.every and self.n_requests % self.every == 0:
                kind = self.kinds[next(self._turn) % len(self.kinds)]
                self.failed[kind] += 1
        if kind is None:
            return self._app(environ, start)
        if kind == "lost answer":  # it is carried out, and the client never learns of it
            list(self._app(environ, lambda *args, **kwargs: None))
        if kind == "timeout":
            time.sleep(TIMEOUT_S)
        code = "503 Slow Down" if kind == "503" else "500 Internal Server Error"
        name = "SlowDown" if kind == "503" else "InternalError"
        body = f"<Error><Code>{name}</Code><Message>injected {kind}</Message></Error>".encode()
        start(code, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[FlakyS3]:
    """The server, in threads of this process."""
    flaky = FlakyS3()
    server = make_server("127.0.0.1", 0, flaky, threaded=True, request_handler=_Silent)
    flaky.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield flaky
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
