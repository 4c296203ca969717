"""Clients that repeat each request until it is answered with 200."""

from __future__ import annotations

import gzip
import heapq
import http.client
import itertools
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.crash.workload import Part, Traces
from tests.support.strategies import encode

CONNECTIONS = 6
MAX_PARTS = 8  # in a request
ANSWER_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Sent:
    """A request whose body has ``spans`` spans."""

    tenant: str
    body: bytes
    encoding: str
    spans: int


class Clients:
    """Sends the parts of new traces, about ``rate`` traces a second, over several connections to
    ``addresses``. A connection that gets no answer goes on at the next address.

    Unanswered requests are sent again, although the service may have accepted them. So are some
    answered ones, as if the client had not received the answer.
    """

    def __init__(self, addresses: Sequence[str], traces: Traces, rate: float) -> None:
        self._addresses = addresses
        self._traces = traces
        self._rng = random.Random(traces.rng.random())
        self._rate = rate
        self._waiting: queue.Queue[Sent] = queue.Queue(40)
        self._making = True
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._again: list[Sent] = []
        self.statuses: Counter[str] = Counter()
        self.acknowledged = 0
        """Spans of requests that were answered with 200, repetitions included."""
        self.failure: str | None = None
        self._producer = threading.Thread(target=self._produce, daemon=True)
        self._senders = [
            threading.Thread(target=self._send_all, args=(number,), daemon=True)
            for number in range(CONNECTIONS)
        ]

    def start(self) -> None:
        for thread in (self._producer, *self._senders):
            thread.start()

    def finish(self, seconds: float) -> None:
        """Stop making traces, and return when all of them are acknowledged."""
        self._making = False
        self._producer.join(seconds)
        assert not self._producer.is_alive(), "some spans could not be sent"
        end = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < end and not self.failure:
            time.sleep(0.02)
        self._stop.set()
        assert self.failure is None, self.failure
        assert not self._waiting.unfinished_tasks, f"not acknowledged; answers: {self.statuses}"
        for thread in self._senders:
            thread.join(ANSWER_SECONDS)

    def abandon(self) -> None:
        """Stop at once."""
        self._making = False
        self._stop.set()

    def _produce(self) -> None:
        due: list[tuple[float, int, Part]] = []
        numbers = itertools.count()
        next_trace = time.monotonic()
        while (self._making or due) and not self._stop.is_set():
            now = time.monotonic()
            next_trace = max(next_trace, now - 0.2)  # do not catch up after downtime
            while self._making and next_trace <= now:
                for part in self._traces.new():
                    heapq.heappush(due, (now + part.after, next(numbers), part))
                next_trace += self._rng.expovariate(self._rate)
            ready: dict[str, list[Part]] = {}
            while due and due[0][0] <= now:
                part = heapq.heappop(due)[2]
                ready.setdefault(part.tenant, []).append(part)
            for tenant, parts in ready.items():
                self._pack(tenant, parts)
            with self._lock:
                again, self._again = self._again, []
            for sent in again:
                self._put(sent)
            time.sleep(0.02)

    def _pack(self, tenant: str, parts: list[Part]) -> None:
        """Put parts into requests. A part stays whole and its spans keep their order."""
        rng = self._rng
        rng.shuffle(parts)
        while parts:
            size = rng.randint(1, MAX_PARTS)
            chosen, parts = parts[:size], parts[size:]
            spans = [span for part in chosen for span in part.spans]
            body = encode(spans)
            if rng.random() < 0.3:
                self._put(Sent(tenant, gzip.compress(body, 1), "gzip", len(spans)))
            else:
                self._put(Sent(tenant, body, "", len(spans)))

    def _put(self, sent: Sent) -> None:
        while not self._stop.is_set():
            try:
                self._waiting.put(sent, timeout=0.2)
            except queue.Full:
                continue
            return

    def _send_all(self, number: int) -> None:
        connections = [
            http.client.HTTPConnection(each, timeout=ANSWER_SECONDS) for each in self._addresses
        ]
        addresses = itertools.cycle(connections)
        for _ in range(number % len(self._addresses) + 1):
            connection = next(addresses)
        rng = random.Random(self._rng.random())
        while not self._stop.is_set():
            try:
                sent = self._waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            while not self._stop.is_set():
                status = self._try(connection, sent)
                if status == "200":
                    with self._lock:
                        self.acknowledged += sent.spans
                        if self._making and rng.random() < 0.05:
                            self._again.append(sent)
                    break
                connection = next(addresses)
                if status not in ("unanswered", "503", "429"):
                    self.failure = f"a good request was answered with {status}"
                    self._stop.set()
                time.sleep(rng.uniform(0.02, 0.2))
            self._waiting.task_done()
        for each in connections:
            each.close()

    def _try(self, connection: http.client.HTTPConnection, sent: Sent) -> str:
        headers = {"Content-Type": "application/x-protobuf", "X-Scope-OrgID": sent.tenant}
        if sent.encoding:
            headers["Content-Encoding"] = sent.encoding
        try:
            connection.request("POST", "/v1/traces", sent.body, headers)
            answer = connection.getresponse()
            answer.read()
            status = str(answer.status)
        except (OSError, http.client.HTTPException):
            connection.close()
            status = "unanswered"
        with self._lock:
            self.statuses[status] += 1
        return status
