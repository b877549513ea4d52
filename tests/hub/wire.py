"""The HTTP of the stand-in hub: requests, answers, and what can go wrong between them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.repos import HubError

if TYPE_CHECKING:
    from hub.server import HubServer

CHUNK = 65536


@dataclass
class Fault:
    """What goes wrong with some requests, and with which.

    Args:
        method: "GET", "PUT", …; "*": any.
        path: A regular expression, searched in the path (unquoted, without query).
        times: So many requests, then no more.
        after: Lets the first so many pass.
        every: Hits one request in so many.
        status: Answers this, instead of doing what is asked.
        headers: Sent with that status.
        hang: Does not answer for so many seconds, then closes the connection.
        cut: Closes the connection after so many bytes of the body of the answer.
        cut_request: Closes it after so many bytes of the body of the request, which is then not done.
        lose: Does what is asked, and closes the connection without an answer.
        reset: Cuts, if they are to, are resets of the connection.
        corrupt: Flips a bit of this byte of the body of the answer; -1: the last.
    """

    method: str
    path: str
    times: int | None = None
    after: int = 0
    every: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: int | None = None
    cut_request: int | None = None
    lose: bool = False
    reset: bool = False
    corrupt: int | None = None
    seen: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether it is this request's turn; counts it."""
        if self.method not in ("*", method) or not re.search(self.path, path):
            return False
        self.seen += 1
        spent = self.times is not None and self.hits >= self.times
        turn = self.seen > self.after and (self.seen - self.after) % self.every == 0
        if spent or not turn:
            return False
        self.hits += 1
        return True


class Faults:
    """The faults there are; a request gets the first that strikes."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, method: str, path: str, **what: Any) -> Fault:
        """Add a fault: see Fault. The one that comes back counts the requests it has seen, and hit."""
        fault = Fault(method, path, **what)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def pick(self, method: str, path: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(method, path)), None)


@dataclass
class Request:
    """A request as it came, and what came of it."""

    method: str
    path: str
    query: str
    host: str  # "hub" or "storage"
    authenticated: bool  # it had an Authorization header
    range: str | None = None
    received: int = 0  # bytes of its body
    status: int | None = None  # None: no answer (yet)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class CutError(Exception):
    """The connection is to be closed."""


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


@dataclass
class Call:
    """A request, taken apart."""

    host: str
    method: str
    raw_path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def parts(self) -> list[str]:
        return [unquote(part) for part in self.raw_path.strip("/").split("/")]

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, "The body is not JSON") from error


def ranged(call: Call, content: bytes, headers: dict[str, str]) -> Answer:
    """Content, or the range of it that is asked for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    headers = {"Content-Type": "application/octet-stream", **headers}
    if not match or match[0] == "bytes=-":
        return Answer(200, content, headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if start > end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, host: str, port: int):
        self.hub, self.host = hub, host
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        # That of HTTPServer asks a name server for the name of the host.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for each in list(self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away is none of ours.
        if not isinstance(sys.exception(), OSError):
            self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        path = unquote(url.path)
        record = Request(self.command, path, url.query, self.server.host, "authorization" in self.headers, self.headers.get("Range"))
        hub.requests.append(record)
        fault = hub.faults.pick(self.command, path) or Fault("*", "")
        try:
            if fault.hang:
                hub.stopping.wait(fault.hang)
                raise CutError
            body = self._body(fault, record)
            headers = {name.lower(): value for name, value in self.headers.items()}
            call = Call(self.server.host, self.command, url.path, parse_qs(url.query, keep_blank_values=True), headers, body)
            answer = self._fail(fault) if fault.status else self._answer(call)
            if fault.lose:
                raise CutError
            record.status = answer.status
            self._send(answer, fault)
        except CutError:
            self._cut(fault.reset)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _fail(self, fault: Fault) -> Answer:
        assert fault.status
        return as_json({"error": f"A fault: {fault.status}"}, fault.status, **fault.headers)

    def _answer(self, call: Call) -> Answer:
        try:
            return self.server.hub.answer(call)
        except HubError as error:
            told = {"X-Error-Message": error.message.encode("ascii", "replace").decode(), **error.headers}
            if error.code:
                told["X-Error-Code"] = error.code
            return as_json({"error": error.message, **error.more}, error.status, **told)
        except Exception as error:
            self.server.hub.errors.append(traceback.format_exc())
            return as_json({"error": repr(error)}, 500)

    def _body(self, fault: Fault, record: Request) -> bytes:
        taken = bytearray()
        for piece in self._pieces(fault):
            taken += piece
            record.received = len(taken)
        return bytes(taken)

    def _pieces(self, fault: Fault) -> Iterator[bytes]:
        """The body of the request, as it comes."""
        left = fault.cut_request
        for size in self._sizes():
            while size > 0:
                if left == 0:
                    raise CutError
                piece = self.rfile.read(min(size, CHUNK) if left is None else min(size, CHUNK, left))
                if not piece:
                    raise CutError  # by the client
                size -= len(piece)
                left = None if left is None else left - len(piece)
                yield piece
        if fault.cut_request is not None:
            raise CutError

    def _sizes(self) -> Iterator[int]:
        """The lengths of the parts of the body of the request; the caller reads each before it asks for the next."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield int(self.headers.get("Content-Length") or 0)
            return
        while line := self.rfile.readline():
            if size := int(line.split(b";")[0], 16):
                yield size
                self.rfile.readline()
                continue
            while self.rfile.readline().strip():
                pass
            return
        raise CutError  # by the client

    def _send(self, answer: Answer, fault: Fault) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = answer.body
        if fault.corrupt is not None and body:
            changed = bytearray(body)
            changed[fault.corrupt] ^= 1
            body = bytes(changed)
        self.wfile.write(memoryview(body)[: fault.cut])
        if fault.cut is not None:
            raise CutError

    def _cut(self, reset: bool) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            if reset:
                # No lingering: closing sends a reset, and forgets what was not sent yet.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
