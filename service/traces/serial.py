"""Due traces as bytes, to be kept outside of the process and decided later.

NumPy's ``.npz`` with a JSON header beside the arrays, compressed with zstd. The rules go along as
definitions and are compiled again: what was due is decided by the rules that it was folded under.
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

from service.rules.compile import CompiledRules, compile_rules
from service.rules.definition import RuleFileError, make_rule
from service.traces.due import Context, DueTraces

FORMAT = 1
MAX_BYTES = 1 << 30  # decompressed
_LEVEL = 1
_HEADER = "header"
_ARRAYS = ("rows", "names", "entries", "starts")
_COMPILED_KEPT = 64

Arrays = dict[str, npt.NDArray[Any]]


class SerialError(ValueError):
    """Bytes that are no due traces of this version of the program."""


def to_bytes(due: DueTraces) -> bytes:
    """``due`` with its rules and with what its traces were before; without its ticket."""
    arrays: Arrays = {}
    header = {"format": FORMAT, **_describe(due, arrays, "", None)}
    arrays[_HEADER] = np.frombuffer(orjson.dumps(header), np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return zstandard.compress(file.getbuffer(), _LEVEL)


def from_bytes(data: bytes) -> DueTraces:
    """What :func:`to_bytes` was given. Raises :exc:`SerialError` for anything else, and where the
    rules do not compile to the checks that the arrays speak of."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES)
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays: Arrays = dict(file)
        header = orjson.loads(arrays[_HEADER].tobytes())
        if header["format"] != FORMAT:
            raise SerialError(f"due traces of format {header['format']}, not {FORMAT}")
        return _build(header, arrays, "", None)
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


def _describe(
    due: DueTraces, arrays: Arrays, prefix: str, rules: CompiledRules | None
) -> dict[str, Any]:
    """The header of ``due``, whose arrays are added under names with ``prefix``; its rules are left
    out where they are ``rules``."""
    for name in _ARRAYS:
        arrays[prefix + name] = getattr(due, name)
    if due.spilled is not None:
        arrays[prefix + "spilled"] = due.spilled
    header: dict[str, Any] = {
        "tenant": due.tenant,
        "closed": due.closed,
        "services": list(due.services),
        "received_ns": due.received_ns,
        "spans": due.spans,
        "contexts": [
            [k, context.window, context.first, [int(each) for each in context.spans]]
            for k, context in due.contexts.items()
        ],
        "raised": [[k, *map(list, sorted(each))] for k, each in due.raised.items()],
    }
    if due.rules is not rules:
        header["version"] = due.rules.version
        header["rules"] = [rule.definition() for rule in due.rules.rules]
        header["checks"] = list(due.rules.check_names)
    if due.before is not None:
        header["before"] = _describe(due.before, arrays, prefix + "before.", due.rules)
    return header


def _build(
    header: dict[str, Any], arrays: Arrays, prefix: str, rules: CompiledRules | None
) -> DueTraces:
    if "rules" in header:
        rules = _compiled(orjson.dumps(header["rules"]), header["version"])
        if list(rules.check_names) != header["checks"]:
            raise SerialError("the rules compile to other checks in this version of the program")
    if rules is None:
        raise SerialError("due traces without rules")
    before = header.get("before")
    return DueTraces(
        tenant=header["tenant"],
        rules=rules,
        closed=header["closed"],
        rows=arrays[prefix + "rows"],
        names=arrays[prefix + "names"],
        entries=arrays[prefix + "entries"],
        starts=arrays[prefix + "starts"],
        services=header["services"],
        before=None if before is None else _build(before, arrays, prefix + "before.", rules),
        spilled=arrays.get(prefix + "spilled"),
        contexts={
            k: Context(window, first, tuple(spans))
            for k, window, first, spans in header["contexts"]
        },
        raised={
            k: frozenset((rule, version, clause) for rule, version, clause in each)
            for k, *each in header.get("raised", [])
        },
        received_ns=header["received_ns"],
        spans=header["spans"],
    )


@lru_cache(maxsize=_COMPILED_KEPT)
def _compiled(definitions: bytes, version: str) -> CompiledRules:
    return compile_rules([make_rule(each) for each in orjson.loads(definitions)], version)
