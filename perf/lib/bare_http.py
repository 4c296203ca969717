"""A bare HTTP server for comparison: uvicorn with httptools, which reads each body and answers 200.

``python -m perf.lib.bare_http PORT`` listens on 127.0.0.1.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

_HEADERS = [(b"content-type", b"application/x-protobuf"), (b"content-length", b"0")]


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An ASGI application that reads the request's body and drops it."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": b""})


def main() -> None:
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        http="httptools",
        loop="asyncio",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
