"""Due traces as bytes, which are stored outside the process and decided later.

NumPy's ``.npz`` with a JSON header next to the arrays, compressed with zstd. The rules are included
as definitions and compiled again, so that the traces are decided by the rules they were folded
under.
"""

from __future__ import annotations

import io
import zipfile
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import zstandard

from betrace.service.rules.compile import CompiledRules, compile_definitions
from betrace.service.rules.definition import RuleFileError
from betrace.service.traces.due import Context, DueTraces
from betrace.service.traces.signal_history import history_from_json, history_to_json

FORMAT = 2
MAX_BYTES = 1 << 30  # decompressed
_LEVEL = 1
_HEADER = "header"
_ARRAYS = ("rows", "names", "entries", "starts")
_COMPILED_KEPT = 64

Arrays = dict[str, npt.NDArray[Any]]


class SerialError(ValueError):
    """The bytes are not due traces of this version of the program."""


def to_bytes(due: DueTraces) -> bytes:
    """``due`` with its rules, but without its ticket."""
    arrays: Arrays = {name: getattr(due, name) for name in _ARRAYS}
    if due.spilled is not None:
        arrays["spilled"] = due.spilled
    header = {"format": FORMAT, **_describe(due)}
    arrays[_HEADER] = np.frombuffer(orjson.dumps(header), np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return zstandard.compress(file.getbuffer(), _LEVEL)


def from_bytes(data: bytes) -> DueTraces:
    """The inverse of :func:`to_bytes`. Raises :exc:`SerialError` for other bytes, and if the rules
    no longer compile to the checks in the arrays."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES)
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays: Arrays = dict(file)
        header = orjson.loads(arrays[_HEADER].tobytes())
        if header["format"] != FORMAT:
            raise SerialError(f"the due traces have format {header['format']}, expected {FORMAT}")
        return _build(header, arrays)
    except SerialError:
        raise
    except (
        zstandard.ZstdError,
        zipfile.BadZipFile,
        orjson.JSONDecodeError,
        RuleFileError,
        OSError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise SerialError(f"damaged due traces: {error}") from error


def _describe(due: DueTraces) -> dict[str, Any]:
    return {
        "tenant": due.tenant,
        "closed": due.closed,
        "services": list(due.services),
        "received_ns": due.received_ns,
        "spans": due.spans,
        "contexts": [
            [k, context.window, context.first, [int(each) for each in context.spans]]
            for k, context in due.contexts.items()
        ],
        "told": [[k, history_to_json(each)] for k, each in due.signal_history.items()],
        "version": due.rules.version,
        "rules": orjson.Fragment(due.rules.definitions),
        "checks": list(due.rules.check_names),
    }


def _build(header: dict[str, Any], arrays: Arrays) -> DueTraces:
    rules = _compiled(orjson.dumps(header["rules"]), header["version"])
    if list(rules.check_names) != header["checks"]:
        raise SerialError("the rules compile to other checks in this version of the program")
    return DueTraces(
        tenant=header["tenant"],
        rules=rules,
        closed=header["closed"],
        rows=arrays["rows"],
        names=arrays["names"],
        entries=arrays["entries"],
        starts=arrays["starts"],
        services=header["services"],
        spilled=arrays.get("spilled"),
        contexts={
            k: Context(window, first, tuple(spans))
            for k, window, first, spans in header["contexts"]
        },
        signal_history={k: history_from_json(rows) for k, rows in header["told"]},
        received_ns=header["received_ns"],
        spans=header["spans"],
    )


@lru_cache(maxsize=_COMPILED_KEPT)
def _compiled(definitions: bytes, version: str) -> CompiledRules:
    return compile_definitions(definitions, version)
