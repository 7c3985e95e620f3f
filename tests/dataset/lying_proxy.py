"""An HTTP proxy between writers and an object store that spoils answers.

A lie says what the client gets, and whether the server has done before what was asked: "503 after"
(or another status), "cut after" (the connection ends), "hang after" (it stays open); "503 before".
With "hang late", the server does it when the client has given up, or has died.
"""

import contextlib
import http.client
import http.server
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import unquote

AFTER = ("503 after", "cut after", "hang after", "hang late")
CREATES, WRITES, READS = 0.6, 0.2, 0.05  # the shares of requests to spoil
CREATED = ("If-None-Match", "x-goog-if-generation-match")
CONDITIONS = (*CREATED, "If-Match")
HANG_SECONDS = 60.0
PAUSE_SECONDS = 0.05
ALONE = ("connection", "keep-alive", "transfer-encoding", "content-length")  # of one connection

# From a request's method, path and headers to how it is spoiled, or None.
Lie = Callable[[str, str, Mapping[str, str]], str | None]


def honest(method: str, path: str, headers: Mapping[str, str]) -> None:
    """Spoils nothing."""


def lies(seed: int, scheme: str) -> Lie:
    """Spoils requests at random; a 409 means "try again" on S3 alone."""
    chance, lock = random.Random(seed), threading.Lock()
    quick = ("503 after", "cut after", "503 before", "cut before")
    slow = ("hang after", "hang late")
    conflict = ("409 before",) * 2 * (scheme == "s3")

    def lie(method: str, path: str, headers: Mapping[str, str]) -> str | None:
        is_create = method == "PUT" and any(name in headers for name in CREATED)
        with lock:
            if method in ("GET", "HEAD"):
                kinds, share = ("503 before", "cut before"), READS
            elif is_create:
                kinds, share = (*quick, *quick, "503 after", *slow, *conflict), CREATES
            else:
                kinds, share = (*quick, *quick, *quick, *slow), WRITES
            return chance.choice(kinds) if chance.random() < share else None

    return lie


def once(kind: str, method: str, has: str = "") -> Lie:
    """Spoils the first request of a method with this text in its path."""
    left = [kind]

    def lie(asked: str, path: str, headers: Mapping[str, str]) -> str | None:
        return left.pop() if left and asked == method and has in path else None

    return lie


class Proxy(http.server.ThreadingHTTPServer):
    """A running proxy.

    Attributes:
      requests: how many requests there were, by method.
      spoiled: how many were spoiled, by kind.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, lie: Lie, deaf: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.lie, self.deaf = port, lie, deaf
        self.ended = threading.Event()
        self.requests: Counter[str] = Counter()
        self.spoiled: Counter[str] = Counter()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def handle_error(self, *_) -> None:
        """Says nothing: killed clients leave broken connections."""


@contextlib.contextmanager
def proxy(port: int, lie: Lie = honest, deaf: tuple[str, ...] = ()) -> Iterator[Proxy]:
    """Yields a proxy for the server at a port of this machine.

    Args:
      deaf: the headers that do not arrive, such as those of conditions.
    """
    with Proxy(port, lie, deaf) as running:
        thread = threading.Thread(target=running.serve_forever, args=(PAUSE_SECONDS,))
        thread.start()
        try:
            yield running
        finally:
            running.ended.set()
            running.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.lie(self.command, unquote(self.path), self.headers)
        self.server.requests[self.command] += 1
        if kind is None:
            self._answer(*self._asked(body))
            return
        self.server.spoiled[kind] += 1
        how, when = kind.split()
        if when == "after":
            self._asked(body)
        if how.isdigit():
            said = b"" if self.command == "HEAD" else f"<Error><Code>{how}</Code></Error>".encode()
            self._answer(int(how), {"Content-Length": str(len(said))}, said)
            return
        if how == "hang":
            self._wait()
        if when == "late":
            self._asked(body)
        self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _asked(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Returns the server's answer."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        deaf = {name.lower() for name in self.server.deaf}
        headers = {n: value for n, value in self.headers.items() if n.lower() not in deaf}
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
        said = {n: value for n, value in answer.getheaders() if n.lower() not in ALONE}
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        return answer.status, said | {"Content-Length": str(size or 0)}, content

    def _wait(self) -> None:
        """Waits until the client gives up."""
        self.connection.settimeout(PAUSE_SECONDS)
        for _ in range(int(HANG_SECONDS / PAUSE_SECONDS)):
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    return
            if self.server.ended.is_set():
                return

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
