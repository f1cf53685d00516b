"""A proxy on loopback that fails on purpose, in front of a storage server."""

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["503", "drop", "403"]


@dataclass
class Proxy:
    """Where it listens and what it saw.

    Attributes:
        address: host and port.
        seen: method and "passed" or the fault, by request.
    """

    address: str
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def faulty_proxy(server: str, *, fault: Fault = "503", share: float = 0.0) -> Iterator[Proxy]:
    """Passes requests on to `server`, but answers a share of them with an error, or closes the connection."""
    draw = random.Random(0)
    proxy = Proxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _handle(self) -> None:
            body = self._body()
            if draw.random() < share:
                proxy.seen.append((self.command, fault))
                if fault == "drop":
                    self.close_connection = True
                else:
                    self._answer(int(fault), {}, b"", 0)
                return
            proxy.seen.append((self.command, "passed"))
            connection = http.client.HTTPConnection(server)
            own = ("connection", "expect", "transfer-encoding", "content-length")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in own}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            length = int(answer.getheader("content-length") or len(data))
            connection.close()
            self._answer(answer.status, dict(answer.getheaders()), data, length)

        def _body(self) -> bytes:
            if "chunked" not in (self.headers.get("transfer-encoding") or ""):
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = [b"start"]
            while parts[-1]:
                size = int(self.rfile.readline().partition(b";")[0], 16)
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts[1:])

        def _answer(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in (
                    "transfer-encoding",
                    "connection",
                    "content-length",
                    "server",
                    "date",
                ):
                    self.send_header(name, value)
            self.send_header("content-length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy.address = f"127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
