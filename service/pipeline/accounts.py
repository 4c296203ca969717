"""Where every span is: accepted = evaluated + in flight + dead-lettered, at every moment."""

from __future__ import annotations

from dataclasses import dataclass

from betrace.service.pipeline.letter_book import SPANS_STAGE
from betrace.service.pipeline.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class SpanAccount:
    """Spans since the start: how many were received, and where they are now."""

    accepted: int
    """Spans of requests answered with 200, or with 503 because the disk did not sync: those spans
    are in the log and are processed as well."""
    replayed: int
    """Read back from the span log at the start."""
    carried: int
    """In dead letters from before the start."""
    evaluated: int
    """Folded into their traces, repeated spans included."""
    in_flight: int
    """On their way to their traces."""
    dead_lettered: int
    """In dead letters, including letters that are being retried."""
    discarded: int
    """In dead letters that an operator discarded, or that were moved to files."""

    @property
    def balance(self) -> int:
        """0; positive if spans were lost, negative if spans were counted twice."""
        received = self.accepted + self.replayed + self.carried
        return received - self.evaluated - self.in_flight - self.dead_lettered - self.discarded


def span_account(pipeline: Pipeline, replayed: int) -> SpanAccount:
    """The account as of now; call on the Trio thread. ``replayed`` spans were read back at the
    start."""
    letters = pipeline.letters.book
    channel = pipeline.batches.statistics()
    accepted = pipeline.ingest.counts.accepted + pipeline.ingest.counts.unacknowledged
    retried = letters.counts.retried_weight.get(SPANS_STAGE, 0)
    passed_by = pipeline.correlate.passed_by  # went to the backlog without the channel
    received = accepted + replayed + retried
    waiting = received - passed_by - channel.total_in  # not in the channel yet
    backlog = pipeline.correlate.backlog.spans  # the stage is done with them, but they are not
    return SpanAccount(
        accepted=accepted,
        replayed=replayed,
        carried=letters.carried_spans,
        evaluated=pipeline.stages[SPANS_STAGE].statistics().weight_out
        + passed_by
        + pipeline.failed_after_folding
        - pipeline.buried_waiting
        - backlog,
        in_flight=waiting + channel.size + backlog - letters.retrying_spans,
        dead_lettered=letters.spans,
        discarded=letters.counts.lost_weight.get(SPANS_STAGE, 0),
    )
