"""Addresses and certificates of the listeners."""

from __future__ import annotations

import errno
import resource
import socket
from typing import Final

from betrace.service.config.base import split_address

_BACKLOG = 1024
PROMETHEUS_PORT: Final = 9090
"""The port of Prometheus itself, and of this service's metrics by default."""
# What accept() raises when descriptors or memory have run out.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class ListenError(Exception):
    """An address or a certificate cannot be used; the message says why and what to do."""


def listen(address: str) -> socket.socket:
    """A non-blocking socket listening on ``host:port``. Raises :exc:`ListenError`."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        remedy = "choose an address of this machine"
        if error.errno == errno.EADDRINUSE:
            remedy = "end the program that uses it, or choose another port"
            if port == PROMETHEUS_PORT:
                remedy = (
                    "Prometheus itself listens on this port; choose another with --metrics or "
                    "metrics.address"
                )
        elif error.errno == errno.EACCES:
            remedy = "choose a port above 1023"
        reason = str(error.strerror).partition(" (while")[0].lower()
        raise ListenError(f"cannot listen on {address} ({reason}); {remedy}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def most_connections(wanted: int, share: int) -> int:
    """How many connections a listener may have: ``wanted``, but at most one in ``share`` of the
    files that this process may open, so that no listener takes the descriptors of the others or of
    the stores."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft // share))


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def bad_certificate(certificate: str, key: str, error: OSError) -> ListenError:
    """The error for a certificate that cannot be loaded."""
    return ListenError(
        f"the certificate {certificate} or its key {key} cannot be used "
        f"({error.strerror or error}); check tls.certificate and tls.key"
    )
