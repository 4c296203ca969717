"""Alerts by rule: people are paged because a rule breaks, not because of each trace.

The ledger is the queue, as for exports. The alerts and how far the queues were read are saved so
that a crash neither loses signals nor counts them twice. Each destination is then brought to the
current state of the alerts, which makes repeating a request harmless.

In a cluster one query node at a time does this; the others only show the alerts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import trio
from opentelemetry.util.re import parse_env_headers

from betrace.channels import ThreadRunner, TransientError
from betrace.service.config.alerts import ALERT_WEBHOOK
from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alert import Alert, State
from betrace.service.export.alerts.book import RESENT_NS, AlertBook
from betrace.service.export.alerts.payloads import Links, for_alertmanager, for_webhook
from betrace.service.export.alerts.sender import LOOK_SECONDS, AlertSender, Sending
from betrace.service.export.delivery import make_client, post
from betrace.service.export.exporter import FIRST_PAUSE, LONGEST_PAUSE, POLL_SECONDS
from betrace.service.export.turns import Turns
from betrace.service.pipeline.breakers import Breakers
from betrace.service.signals import Signal
from betrace.service.storage.alert_store import AlertKey, AlertStoreError, SavedAlerts
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.signal_queues import SignalQueues
from betrace.service.times import SECOND

_log = logging.getLogger("service.alerts")

DUTY = "alerts"
PAGE = 500  # signals of a queue read at once
ROUND = 2000  # signals followed before they are saved
REST_SECONDS = 0.2  # between rounds, so that a flood of signals costs little
UPDATE_NS = 5 * SECOND  # between updates of a changed alert
BATCH = 100  # alerts in a request to Alertmanager


@dataclass(slots=True)
class _Destination:
    name: str
    sender: AlertSender
    sent: dict[AlertKey, tuple[int, int]] = field(default_factory=dict)
    """Revision and time of what was sent last, since the start."""
    waiting_since_ns: int = 0
    """When the oldest alert began or ended that it does not know of; 0 for none."""

    @property
    def batched(self) -> bool:
        """Whether it is an Alertmanager: it takes many alerts at once, and wants them again."""
        return self.name != ALERT_WEBHOOK


class Alerts:
    """The alerts and their destinations. Call the methods on the Trio thread, except
    :meth:`forget` and :meth:`firing`. Without destinations it does nothing.

    ``pages_nobody`` says whether a raised signal starts no alert, because its rule is muted or only
    tried out; ``muted_now`` whether a tenant's rule is muted at this moment. Without ``turns`` this
    process follows and sends everything.
    """

    def __init__(
        self,
        settings: Settings,
        queues: SignalQueues,
        store: SavedAlerts,
        breakers: Breakers,
        pages_nobody: Callable[[Signal], bool],
        muted_now: Callable[[str, str], bool],
        turns: Turns | None = None,
    ) -> None:
        self._settings = settings.alerts
        self._queues = queues
        self._store = store
        self._turns = turns
        self._threads = ThreadRunner("alerts", 1)
        self._saving = threading.Lock()
        self._lock = threading.Lock()  # of everything below
        api = settings.api
        self._links = Links(api.page_url, api.public_url, self._settings.runbook_url)
        self.book = AlertBook(
            int(self._settings.resolve_after_seconds * SECOND),
            self._settings.max_active,
            pages_nobody,
            muted_now,
        )
        self._done: dict[str, int] = {}
        self._unsaved: dict[str, int] = {}
        self._new: dict[str, None] = {}
        self._wake = trio.Event()
        self._client = make_client(settings.breakers.export.timeout_seconds)
        self._destinations = {
            name: _Destination(
                name,
                AlertSender(
                    name,
                    partial(self._post, name, url),
                    self._due,
                    self._accepted,
                    breakers.exports[name],
                ),
            )
            for name, url in self._settings.destinations.items()
        }

    def __iter__(self) -> Iterator[AlertSender]:
        return (each.sender for each in self._destinations.values())

    def notify(self, signals: list[Signal]) -> None:
        """Note that these signals are in the ledger."""
        if self._destinations:
            self._new.update(dict.fromkeys(self._queues.of(signals)))
            self._wake.set()

    def forget(self, tenant: str) -> None:
        """Remove the alerts of a deleted tenant, without telling anyone. Blocks; call it from any
        thread."""
        with self._lock:
            self.book.forget(tenant)
        self._save()

    @property
    def destinations(self) -> list[str]:
        """The names of the destinations that are on."""
        return list(self._destinations)

    def firing(self, tenant: str) -> list[Alert]:
        """Copies of a tenant's alerts that fire now, the latest breach first. Blocks; call it from
        any thread."""
        shown = self._store.shown(tenant)
        if shown is not None:
            found = self._read(shown)
        else:
            with self._lock:
                found = [each.copy() for each in self.book if each.tenant == tenant]
        firing = [each for each in found if not each.ended_ns]
        return sorted(firing, key=lambda each: (-each.last_ns, each.rule))

    def lag_seconds(self, name: str) -> float:
        """For how long a destination has not been told of an alert that began or ended."""
        since = self._destinations[name].waiting_since_ns
        return max(time.time() - since / SECOND, 0.0) if since else 0.0

    async def run(self) -> None:
        """Follow the signals and send alerts until cancelled."""
        if not self._destinations:
            return
        async with self._client:
            if self._turns is None:
                await self._work()
            else:
                await self._turns.perform(DUTY, self._work)

    async def _work(self) -> None:
        """Follow the signals and send alerts until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                await self._start()
                nursery.start_soon(self._follow)
                for each in self._destinations.values():
                    nursery.start_soon(each.sender.run)
        finally:
            self._clear()

    def _clear(self) -> None:
        """Forget what another process may change from now on."""
        with self._lock:
            self.book.clear()
            self._unsaved = {}
            for each in self._destinations.values():
                each.sent, each.waiting_since_ns = {}, 0

    def close(self) -> None:
        """End the thread."""
        self._threads.close()

    # Following the signals

    async def _start(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await self._threads.run(self._load)
                return
            except (LedgerError, AlertStoreError, TransientError, OSError) as error:
                _log.warning("alerts cannot be read; trying again: %s", error)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _load(self) -> None:
        """Read the saved alerts. The first time, begin at the end of the queues."""
        progress = self._store.progress()
        if progress is None:
            progress = {each: self._queues.end(each) for each in self._queues.names()}
            self._store.save({}, progress)
        alerts = self._read(self._store.alerts())
        with self._lock:
            self._done = progress
            self.book.restore(alerts)

    @staticmethod
    def _read(saved: Mapping[AlertKey, bytes]) -> list[Alert]:
        """The alerts that can be read."""
        alerts = []
        for (tenant, rule), text in saved.items():
            try:
                alerts.append(Alert.load(text))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                _log.error("the alert of %s of %s is damaged: %s", rule, tenant, error)
        return alerts

    async def _follow(self) -> None:
        poll_at = 0.0
        failing = False
        while True:
            poll = trio.current_time() >= poll_at
            if poll:
                poll_at = trio.current_time() + POLL_SECONDS
            self._wake = trio.Event()
            queues, self._new = self._new, {}
            try:
                left = await self._threads.run(self._round, list(queues), poll)
                failing = False
            except (LedgerError, AlertStoreError, TransientError, OSError) as error:
                left = list(queues)
                poll_at = 0.0
                if not failing:
                    _log.warning("signals cannot be followed for alerts; trying again: %s", error)
                failing = True
            self._new = dict.fromkeys(left) | self._new
            for each in self._destinations.values():
                each.sender.wake()
            await trio.sleep(FIRST_PAUSE if failing else REST_SECONDS)
            if not self._new:
                with trio.move_on_after(LOOK_SECONDS if len(self.book) else POLL_SECONDS):
                    await self._wake.wait()

    def _round(self, queues: list[str], everything: bool) -> list[str]:
        """Follow the next signals of these queues. Returns those that may have more."""
        if everything:
            queues = list(dict.fromkeys([*queues, *self._queues.names()]))
        signals: list[Signal] = []
        upto: dict[str, int] = {}
        full: list[str] = []
        left: list[str] = []
        waiting: list[str] = []  # for other queues
        for number, name in enumerate(queues):
            if len(signals) >= ROUND:
                left = queues[number:]
                break
            if not self._queues.may_read(name, self._done):
                waiting.append(name)
                continue
            page = self._queues.read(name, self._done.get(name, 0), PAGE)
            if page.upto > self._done.get(name, 0):
                upto[name] = page.upto
                signals += self._store.unknown(name, page.signals)
            if page.more:
                full.append(name)
        left += full
        if upto:
            left += waiting
        now = time.time_ns()
        with self._lock:
            self.book.add(signals, now)
            self._done |= upto
            self._unsaved |= upto
            if not left:  # otherwise newer signals may keep the alerts firing
                self.book.expire(now)
                self.book.tidy(list(self._destinations), self._kept_ns(), now)
                self._forget_sent()
        self._save()
        return left

    def _kept_ns(self) -> int:
        return RESENT_NS if self._settings.alertmanager.urls else 0

    def _forget_sent(self) -> None:
        for each in self._destinations.values():
            if len(each.sent) > len(self.book):
                kept = {(alert.tenant, alert.rule) for alert in self.book}
                each.sent = {key: at for key, at in each.sent.items() if key in kept}

    def _save(self) -> None:
        """Save what changed. Blocks, but does not delay callers that only read the alerts."""
        with self._saving:
            with self._lock:
                changed, unsaved = self.book.take_changes(), self._unsaved
                self._unsaved = {}
            if not changed and not unsaved and not self._store.pending:
                return
            try:
                self._store.save(changed, unsaved)
            except BaseException:
                with self._lock:
                    self.book.put_back(changed)
                    self._unsaved = unsaved | self._unsaved
                raise

    # Sending

    async def _due(self, name: str, now: int) -> Sending | None:
        return await self._threads.run(self._next, self._destinations[name], now)

    def _next(self, to: _Destination, now: int) -> Sending | None:
        """What a destination should get next: alerts whose state it does not know, then those that
        it should get again."""
        news: list[tuple[Alert, State, int]] = []
        again: list[tuple[Alert, State, int]] = []
        with self._lock:
            for alert in self.book:
                ends_ns = alert.end_for(to.name, now, self.book.resolve_after_ns)
                if ends_ns is None:
                    continue
                state = State.FIRING if ends_ns > now else State.RESOLVED
                had = alert.delivered.get(to.name)
                if had is None or had.state is not state:
                    news.append((alert, state, ends_ns))
                elif to.batched and self._again(to, alert, now):
                    again.append((alert, state, ends_ns))
            changed = [alert.changed_ns for alert, _, _ in news]
            to.waiting_since_ns = min(changed, default=0)
            if not to.batched:
                wait_ns = int(self._settings.webhook.wait_seconds * SECOND)
                news = [each for each in news if now >= each[0].changed_ns + wait_ns]
            chosen = [*news, *again][: BATCH if to.batched else 1]
            if not chosen:
                return None
            if to.batched:
                body = for_alertmanager([(a, ends_ns) for a, _, ends_ns in chosen], self._links)
            else:
                body = for_webhook(chosen[0][0], chosen[0][1], self._links)
            return Sending(
                tuple(((a.tenant, a.rule), state, a.revision) for a, state, _ in chosen), body
            )

    def _again(self, to: _Destination, alert: Alert, now: int) -> bool:
        """Whether an Alertmanager that knows the alert's state should get it again."""
        sent = to.sent.get((alert.tenant, alert.rule))
        if sent is None:
            return True
        revision, at = sent
        if alert.revision != revision and now >= at + UPDATE_NS:
            return True
        return now >= at + int(self._settings.resend_seconds * SECOND)

    async def _accepted(self, name: str, sending: Sending, now: int) -> None:
        await self._threads.run(self._note_accepted, self._destinations[name], sending, now)

    def _note_accepted(self, to: _Destination, sending: Sending, now: int) -> None:
        with self._lock:
            for key, state, revision in sending.alerts:
                to.sent[key] = revision, now
                self.book.deliver(key, to.name, state, now)
        try:
            self._save()
        except AlertStoreError as error:
            _log.warning("alerts cannot be saved; trying again: %s", error)

    async def _post(self, name: str, url: str, body: bytes) -> None:
        to_webhook = name == ALERT_WEBHOOK
        own = self._settings.webhook if to_webhook else self._settings.alertmanager
        headers = {"Content-Type": "application/json", **parse_env_headers(own.headers)}
        await post(self._client, url if to_webhook else f"{url}/api/v2/alerts", body, headers)
