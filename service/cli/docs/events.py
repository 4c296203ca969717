"""``docs/logging.md``, made from the events' declaration.

``python -m betrace.service.cli.docs.events`` prints it; a test compares it with the file.
"""

from __future__ import annotations

import logging
import sys

from betrace.service.telemetry.events import DECLARED

_HEAD = """\
# The log

The service writes its log to standard error: one line for each change of state, none for each span,
request or batch. `logging.level` is the least severity that is written, `logging.format` the form:

- `text`: time, level, logger and message, for reading.
- `logfmt`: `key=value` pairs, for `grep` and for Loki.
- `json`: an object a line, for anything else.

Times are UTC. In `logfmt` and `json` each line has `time`, `level`, `logger` and `message`; a line
of an event below also has `event`, its name, and its fields, which stay the same when messages are
reworded. An error with a traceback has it as `exception`, in the same line. Lines without an event
are details beside one, or defects; they need no alert of their own.

```sh
betrace serve 2>&1 | jq -c 'select(.event == "breaker.opened")'    # with logging.format = "json"
```

Where it is not enough to know that a stage is slow, `[tracing]` sends the service's own traces by
OTLP over HTTP: for each batch that a stage works on for `tracing.slow_batch_ms` or longer, at most
one a second, a span of the batch (stage, tenants, items, and spans, traces or rows), and in it one
of its wait in the channel and one of the work. `tracing.endpoint` may be this service's own: they
are sent as a tenant of their own, whose batches are not traced.

What operators do is also in `audit.jsonl` in the data directory. What to do about a line at
`warning` or `error` is in `docs/runbook.md`.

Made by `python -m betrace.service.cli.docs.events > docs/logging.md`.

| event | level | fields | message | meaning |
|---|---|---|---|---|
"""


def markdown() -> str:
    """The text of ``docs/logging.md``."""
    rows = []
    for event in DECLARED:
        fields = ", ".join(f"`{name}`" for name in event.fields)
        level = logging.getLevelName(event.level).lower()
        rows.append(f"| `{event.name}` | {level} | {fields} | {event.text} | {event.meaning} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(markdown())
