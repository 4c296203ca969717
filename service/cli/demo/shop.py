"""The sample shop of ``betrace demo``, instrumented with the OpenTelemetry SDK; its own process.

Each of its five services has its own tracer provider, exports over OTLP/HTTP, and propagates the
trace in W3C ``traceparent`` headers, as real services do. Each scenario is one customer's trace;
some break rules in ``rules/``. For each trace it prints a line of JSON:
``{"trace_id", "scenario"}``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SERVICES = ("frontend", "checkout", "payment", "inventory", "notifications")
SLOW_SECONDS = 1.1
PRODUCTS = 12  # in the cart that is read with a query for each
_FLUSH_MS = 200

Headers = dict[str, str]


@dataclass(frozen=True, slots=True)
class Order:
    """What a customer buys, and what happens meanwhile. Times are seconds."""

    amount: float
    _: KW_ONLY
    check_fraud: bool = True
    reserve_first: bool = True
    attempts: int = 1
    decline: bool = False
    alert: bool = True
    log: str = "payment taken"
    pause: float = 0.0
    charges: int = 1
    settled_after: float = 0.0


class Shop:
    """The services, and what they do for a customer. Leaving the context exports what is left."""

    def __init__(self, endpoint: str) -> None:
        self._providers = [_provider(service, endpoint) for service in SERVICES]
        self._tracers = {
            service: provider.get_tracer("shop")
            for service, provider in zip(SERVICES, self._providers, strict=True)
        }
        self._propagator = TraceContextTextMapPropagator()

    def __enter__(self) -> Shop:
        return self

    def __exit__(self, *_: object) -> None:
        for provider in self._providers:
            provider.shutdown()

    @contextmanager
    def _serve(self, service: str, name: str, headers: Headers) -> Iterator[tuple[Span, Headers]]:
        """A request that ``service`` serves: its span, and the headers for onward calls."""
        context = self._propagator.extract(headers)
        tracer: Tracer = self._tracers[service]
        with tracer.start_as_current_span(name, context, SpanKind.SERVER) as span:
            onward: Headers = {}
            self._propagator.inject(onward)
            yield span, onward

    def _note(self, service: str, headers: Headers, message: str) -> None:
        with self._serve(service, "log.write", headers) as (span, _):
            span.set_attribute("message", message)

    def order(self, order: Order) -> str:
        """A customer checks out. Returns the trace id."""
        with self._serve("frontend", "POST /checkout", {}) as (root, headers):
            root.set_attribute("http.request.method", "POST")
            with self._serve("checkout", "checkout.place_order", headers) as (span, headers):
                span.set_attribute("order.total", order.amount)
                if order.reserve_first:
                    self._reserve(headers)
                charged = [self._pay(headers, order) for _ in range(order.charges)]
                if not order.settled_after and not order.decline:
                    self._settle(charged)
                if not order.reserve_first:
                    self._reserve(headers)
                if order.decline and order.alert:
                    with self._serve("notifications", "alert.raise", headers):
                        pass
                time.sleep(order.pause)
        if order.settled_after:  # while nobody waits
            time.sleep(order.settled_after)
            self._settle(charged)
        return format_trace_id(root.get_span_context().trace_id)

    def _reserve(self, headers: Headers) -> None:
        with self._serve("inventory", "inventory.reserve", headers) as (span, _):
            span.set_attributes({"sku": "A-113", "quantity": 1})

    def _pay(self, headers: Headers, order: Order) -> Headers:
        """A charge of the card; returns the headers for what follows it."""
        with self._serve("payment", "payment.charge_card", headers) as (charge, headers):
            charge.set_attributes({"amount": order.amount, "currency": "EUR", "order.id": "1001"})
            if order.check_fraud:
                with self._serve("payment", "payment.fraud_check", headers):
                    pass
            for attempt in range(1, order.attempts + 1):
                with self._serve("payment", "payment.attempt", headers) as (span, _):
                    span.set_attribute("attempt", attempt)
            if order.decline:
                charge.set_status(StatusCode.ERROR, "declined by the bank")
            self._note("payment", headers, order.log)
        return headers

    def _settle(self, charged: Sequence[Headers]) -> None:
        for headers in charged:
            with self._serve("payment", "payment.settle", headers):
                pass

    def browse(self, *, queries: int = 1) -> str:
        """A customer looks at the cart. Returns the trace id."""
        with self._serve("frontend", "GET /cart", {}) as (root, headers):
            root.set_attribute("http.request.method", "GET")
            with self._serve("inventory", "inventory.look_up", headers) as (_, headers):
                for _ in range(queries):
                    self._query(headers, "SELECT name, price FROM products WHERE id = ?")
        return format_trace_id(root.get_span_context().trace_id)

    def earlier_order(self, *, authorize: bool = True) -> str:
        """A customer looks at an earlier order. Returns the trace id."""
        with self._serve("frontend", "GET /orders", {}) as (root, headers):
            root.set_attribute("http.request.method", "GET")
            if authorize:
                with self._serve("checkout", "auth.check", headers) as (_, onward):
                    self._read_order(onward)
            else:
                self._read_order(headers)
        return format_trace_id(root.get_span_context().trace_id)

    def _read_order(self, headers: Headers) -> None:
        with self._serve("checkout", "orders.read", headers) as (_, onward):
            self._query(onward, "SELECT * FROM orders WHERE id = ?")

    def _query(self, headers: Headers, text: str) -> None:
        with self._serve("inventory", "db.query", headers) as (span, _):
            span.set_attributes({"db.system.name": "postgresql", "db.query.text": text})


# Every scenario, with the rules in rules/ that it breaks.
SCENARIOS: dict[str, tuple[Callable[[Shop], str], frozenset[str]]] = {
    "looks at the cart": (Shop.browse, frozenset()),
    "looks at the cart, with a query per product": (
        lambda shop: shop.browse(queries=PRODUCTS),
        frozenset({"n-plus-one"}),
    ),
    "looks at an earlier order": (Shop.earlier_order, frozenset()),
    "looks at an order, and nobody asks who it is": (
        lambda shop: shop.earlier_order(authorize=False),
        frozenset({"read-without-authorization"}),
    ),
    "buys a book": (lambda shop: shop.order(Order(29.90, check_fraud=False)), frozenset()),
    "buys a laptop": (lambda shop: shop.order(Order(1899.0)), frozenset()),
    "buys a laptop, and nobody checks for fraud": (
        lambda shop: shop.order(Order(1899.0, check_fraud=False)),
        frozenset({"payment-fraud-check"}),
    ),
    "pays at the third attempt": (lambda shop: shop.order(Order(49.0, attempts=3)), frozenset()),
    "pays at the sixth attempt": (
        lambda shop: shop.order(Order(49.0, attempts=6)),
        frozenset({"payment-retries"}),
    ),
    "is charged before the stock is reserved": (
        lambda shop: shop.order(Order(15.0, reserve_first=False)),
        frozenset({"stock-reserved-before-charge"}),
    ),
    "is charged twice": (
        lambda shop: shop.order(Order(49.0, charges=2)),
        frozenset({"double-charge"}),
    ),
    "is charged, and the money comes late": (
        lambda shop: shop.order(Order(49.0, settled_after=SLOW_SECONDS)),
        frozenset({"slow-settlement"}),
    ),
    "waits for the checkout": (
        lambda shop: shop.order(Order(15.0, pause=SLOW_SECONDS)),
        frozenset({"slow-checkout"}),
    ),
    "finds the card number in a log": (
        lambda shop: shop.order(Order(15.0, log="charged card 4111 1111 1111 1111")),
        frozenset({"no-card-number-in-logs"}),
    ),
    "has a card declined, and an alert is raised": (
        lambda shop: shop.order(Order(15.0, decline=True)),
        frozenset(),
    ),
    "has a card declined, and no alert is sent": (
        lambda shop: shop.order(Order(15.0, decline=True, alert=False)),
        frozenset({"error-without-alert"}),
    ),
    "has a very bad day": (
        lambda shop: shop.order(
            Order(
                5000.0,
                check_fraud=False,
                reserve_first=False,
                attempts=9,
                decline=True,
                alert=False,
                log="card 4111-1111-1111-1111 declined",
            )
        ),
        frozenset(
            {
                "payment-fraud-check",
                "stock-reserved-before-charge",
                "payment-retries",
                "error-without-alert",
                "no-card-number-in-logs",
            }
        ),
    ),
}


def _provider(service: str, endpoint: str) -> TracerProvider:
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    compression = Compression.Gzip if service == "payment" else Compression.NoCompression
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", compression=compression)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_FLUSH_MS))
    return provider


def _run(shop: Shop, scenario: str) -> None:
    act, _ = SCENARIOS[scenario]
    line = {"trace_id": act(shop), "scenario": scenario}
    print(json.dumps(line), flush=True)


def _run_busily(shop: Shop) -> None:
    """Send all scenarios in random order, again and again. SIGTERM ends it, but each is sent at
    least once."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    sent, names = 0, list(SCENARIOS)
    while sent < len(names) or not stopping:
        if sent % len(names) == 0:
            random.shuffle(names)
        _run(shop, names[sent % len(names)])
        sent += 1
        time.sleep(random.uniform(0, 0.2))


def main(argv: Sequence[str] | None = None) -> None:
    """Send traces to ``--endpoint``: every scenario once with ``--once``; all scenarios repeatedly
    with ``--busy``, until SIGTERM; otherwise random ones until the reader of the output goes
    away."""
    parser = argparse.ArgumentParser(
        prog="python -m betrace.service.cli.demo.shop", description=__doc__
    )
    parser.add_argument("--endpoint", required=True, help="such as http://127.0.0.1:4318")
    parser.add_argument("--once", action="store_true", help="send every scenario once, then exit")
    parser.add_argument("--busy", action="store_true", help="send all scenarios until SIGTERM")
    options = parser.parse_args(argv)
    with Shop(options.endpoint) as shop:
        if options.once:
            for scenario in SCENARIOS:
                _run(shop, scenario)
            return
        if options.busy:
            _run_busily(shop)
            return
        customers = random.Random()
        good = [name for name, (_, broken) in SCENARIOS.items() if not broken]
        bad = [name for name, (_, broken) in SCENARIOS.items() if broken]
        try:
            while True:
                _run(shop, customers.choice(good if customers.random() < 0.7 else bad))
                time.sleep(customers.uniform(0.3, 1.5))
        except BrokenPipeError:  # the reader has gone; discard what is in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
