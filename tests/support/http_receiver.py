"""A destination of signals: an HTTP server with scripted answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest


@dataclass
class Receiver:
    """The requests received, and the answers: first ``answers``, then 200."""

    url: str = ""
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    refuses: str | None = None
    """Requests that contain this text are answered with 400."""

    def taken(self) -> list[bytes]:
        return [body for headers, body in self.requests if headers["answered"] == "200"]

    def records(self) -> list[Any]:
        """Return the log records of the accepted requests."""
        return [
            record
            for body in self.taken()
            for of_tenant in ExportLogsServiceRequest.FromString(body).resource_logs
            for scope in of_tenant.scope_logs
            for record in scope.log_records
        ]

    def alerts(self) -> list[dict[str, Any]]:
        return [alert for body in self.taken() for alert in json.loads(body)["alerts"]]


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                status, headers = receiver.answers.pop(0) if receiver.answers else (200, {})
                if receiver.refuses is not None and receiver.refuses.encode() in body:
                    status = 400
                came = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append((came | {"answered": str(status)}, body))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/v1/logs"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
