import json

import pytest

from betrace.service.storage.audit_log import AuditLog


def records(path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_records_are_appended_after_a_restart(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, 10_000, 3)
    log.append({"n": 1})
    AuditLog(path, 10_000, 3).append({"n": 2})
    assert records(path) == [1, 2]
    assert log.records == 1


def test_old_files_are_kept_up_to_a_number(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, 20, 2)  # two records each
    for number in range(1, 10):
        log.append({"n": number})
    assert records(path) == [9]
    assert records(tmp_path / "audit.jsonl.1") == [7, 8]
    assert records(tmp_path / "audit.jsonl.2") == [5, 6]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_record_that_cannot_be_written_is_an_error(tmp_path):
    log = AuditLog(tmp_path / "missing" / "audit.jsonl", 20, 2)
    with pytest.raises(OSError, match="No such file"):
        log.append({"n": 1})
