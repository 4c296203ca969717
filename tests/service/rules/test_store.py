"""Rule files, and the store of a directory with them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.rules.definition import Problem, Rule, RuleFileError, etag, make_rule
from betrace.service.rules.parse import parse
from betrace.service.rules.store import (
    RuleConflictError,
    RuleLimitError,
    RuleNotFoundError,
    RuleReadOnlyError,
    RuleStore,
)
from betrace.service.rules.yaml_file import (
    MAX_RULES,
    dump_rules,
    load_file,
    load_text,
)
from betrace.service.signals import rule_version
from tests.support.examples import examples

EXAMPLE = """\
rules:
  - id: payment-fraud-check
    name: Payments over 1000 are checked for fraud
    description: Finance control 4.2   # optional
    severity: critical
    enabled: false
    labels: {team: payments, tier: 1, loud: true}
    condition: |
      when   { payment.charge_card.where(amount > 1000) }
      always { payment.fraud_check }
  - {id: retries, condition: count(http.retry) > 3}
"""


def problems(text: str) -> list[Problem]:
    with pytest.raises(RuleFileError) as caught:
        load_text(text, "rules.yaml")
    return list(caught.value.problems)


def rule(rule_id: str = "a", condition: str = "a", **fields: Any) -> Rule:
    return make_rule({"id": rule_id, "condition": condition, **fields})


def text_of(*ids: str, condition: str = "a") -> str:
    return dump_rules([rule(rule_id, condition) for rule_id in ids])


# Files


def test_a_rule_file() -> None:
    condition = (
        "when   { payment.charge_card.where(amount > 1000) }\nalways { payment.fraud_check }\n"
    )
    first, second = load_text(EXAMPLE, "rules.yaml")
    assert first == Rule(
        id="payment-fraud-check",
        name="Payments over 1000 are checked for fraud",
        description="Finance control 4.2",
        severity="critical",
        enabled=False,
        labels={"team": "payments", "tier": "1", "loud": "true"},
        condition=condition,
        version=rule_version(condition),
        syntax=parse(condition),
    )
    assert (second.name, second.severity, second.enabled) == ("retries", "medium", True)
    assert (second.description, second.labels) == ("", {})


def test_a_file_without_rules_must_say_so() -> None:
    assert load_text("rules: []", "rules.yaml") == []
    for text in ("", "# nothing\n", "---\n"):
        assert "empty" in problems(text)[0].message


def test_aliases_and_merges_work() -> None:
    loaded = load_text(
        "rules:\n- &base {id: a, severity: low, condition: a}\n- {<<: *base, id: b}\n", "r"
    )
    assert [(r.id, r.severity) for r in loaded] == [("a", "low"), ("b", "low")]


def test_all_problems_are_reported_with_their_lines() -> None:
    text = """\
rules:
  - id: Bad Id
    severty: high
    condition: a
  - id: good
    condition: a
  - id: syntax
    condition: |
      when { a }

        always { b && c }
  - id: quoted
    condition: "a =\\
      b"
  - id: good
    condition: b
    enabled: maybe
    severity: hihg
    labels: [x]
  - id: empty
"""
    found = [(p.rule_id, p.line, p.message, p.hint) for p in problems(text)]
    assert found == [
        (
            "Bad Id",
            2,
            "'id' is not a valid rule id",
            "an id has 1 to 128 characters a-z 0-9 . _ - and begins with a letter or digit",
        ),
        ("Bad Id", 3, "unknown key 'severty'", "did you mean 'severity'?"),
        ("syntax", 11, "found '&&', which is not part of the language", "use 'and'"),
        ("quoted", 13, "found '=', which is not part of the language", "use '=='"),
        (
            "good",
            18,
            "'severity' must be one of critical, high, medium, low, info",
            "did you mean 'high'?",
        ),
        ("good", 17, "'enabled' must be true or false", None),
        ("good", 19, "'labels' is not a mapping", "write it as {team: payments}"),
        ("empty", 20, "the key 'condition' is missing", None),
    ]


def test_a_problem_shows_its_line() -> None:
    (problem,) = problems("rules:\n- id: x\n  condition: |\n    a\n    && b\n")
    assert str(problem) == (
        "rules.yaml:5:5: rule x: found '&&', which is not part of the language\n"
        "  && b\n"
        "  ^\n"
        "  hint: use 'and'"
    )


def test_an_id_may_be_used_only_once() -> None:
    (problem,) = problems(text_of("a", "b") + text_of("a").removeprefix("rules:\n"))
    assert (problem.rule_id, problem.line) == ("a", 12)
    assert problem.message == "another rule in the file has this id"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "not valid YAML"),
        ("rules: []\n---\nrules: []", "not valid YAML"),
        ("- id: a", "not a mapping"),
        ("rule:\n- id: a", "unknown key 'rule'"),
        ("{}", "'rules' is missing"),
        ("rules: {a: b}", "'rules' is not a list"),
        ("rules: []\nrules: []", "occurs twice"),
        ("rules: [a]", "this rule is not a mapping"),
        ("rules: [{id: a, id: b}]", "a key occurs twice"),
        ("rules: [{[a]: b}]", "not text"),
        ("rules: [{id: 5, condition: a}]", "'id' is not text"),
        ("rules: [{id: a, condition: {b: c}}]", "'condition' is not text"),
        ("rules: [{id: a, condition: a, labels: {x: [y]}}]", "the label 'x' is not text"),
        ("rules: [{id: a, condition: a, labels: {x: 2024-13-45}}]", "not valid YAML"),
        ("rules: [{id: a, condition: a, name: !!python/object:os.system x}]", "not valid YAML"),
        (f"rules: [{{id: a, condition: a, labels: {{x: {'9' * 5000}}}}}]", "not valid YAML"),
        (f"rules: [{{id: a, condition: a, name: {'x' * 257}}}]", "longer than 256"),
        (
            "rules: [{id: a, condition: a, labels: {"
            + ",".join(map("l{}: x".format, range(33)))
            + "}}]",
            "more than 32 entries",
        ),
        ("rules: [{id: a, condition: a, labels: {'': x}}]", "'labels': String should have"),
        ("rules: &a [*a]", "has no anchor before it"),
        ("rules: [*x]", "has no anchor before it"),
        ("rules: " + "[" * 50 + "]" * 50, "nests deeper"),
        ("rules: " + "[" * 100_000, "nests deeper"),
        ("rules: [" + "a," * 200_001 + "]", "more than 200000 values"),
        ("rules:\n" + "- {id: a, condition: a}\n" * 1001, "1001 rules"),
        ("rules: \0", "not valid YAML"),
        ("rules: \ud800", "not Unicode"),
        ("#" * (4 * 1024 * 1024 + 1), "larger than"),
    ],
    ids=range(28),
)
def test_invalid_files(text: str, message: str) -> None:
    assert message in problems(text)[0].message


def test_a_yaml_bomb_is_rejected_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    start = time.process_time()
    (problem,) = problems("\n".join(lines))
    assert "aliases expanded" in problem.message
    assert problem.line == 6
    assert time.process_time() - start < 1


def test_at_most_a_hundred_problems_are_reported() -> None:
    assert len(problems("rules:\n" + "- {}\n" * 900)) == 100


def file_problems(path: Path) -> list[Problem]:
    try:
        load_file(path)
    except RuleFileError as error:
        return list(error.problems)
    return []


def test_files_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    assert "cannot be read" in file_problems(path)[0].message
    path.write_bytes(b"\xef\xbb\xbf" + EXAMPLE.encode())
    assert len(load_file(path)) == 2
    assert file_problems(path) == []
    path.write_bytes(b"rules: []\n# \xff\n")
    assert (file_problems(path)[0].message, file_problems(path)[0].line) == ("is not UTF-8 text", 2)
    path.write_bytes(b"#" * (4 * 1024 * 1024) + "ä".encode())
    assert "larger than" in file_problems(path)[0].message
    assert file_problems(path)[0].source == str(path)


# Text of a definition: conditions in unusual layouts, names that YAML could misread.
LAYOUTS = ["a", "a\n", "\n\n  a\n\n", "  a\n and c", "a // # c \n", "\ta", "# only\na", "a\n \n"]
ODD = ["when {a}\r\nalways {b}\r\n", 'a.where(x == "ä\0 \x85💰\n ")', '"- x: ["', "not a "]
CONDITIONS = st.sampled_from([*LAYOUTS, *ODD])
NAMES = st.sampled_from(
    ["null", "1", "yes", " x ", "a: b", "#", "- a", "'", "|", "x\ny", "\x85"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(CONDITIONS, NAMES, NAMES, st.dictionaries(NAMES.filter(bool), NAMES, max_size=3))
@settings(max_examples=examples(200))
def test_written_rules_read_back(
    condition: str, name: str, description: str, labels: dict[str, str]
) -> None:
    original = make_rule(
        {
            "id": "a",
            "name": name,
            "description": description,
            "labels": labels,
            "condition": condition,
            "enabled": False,
            "severity": "info",
        }
    )
    assert load_text(dump_rules([original]), "x") == [original]


def test_conditions_are_written_as_blocks() -> None:
    assert "  condition: |\n" in dump_rules([rule(condition="when { a }\nalways { b }\n")])


def test_etags() -> None:
    original = rule()
    assert etag(original) == etag(rule())
    assert etag(original)[0] == etag(original)[-1] == '"'
    changes: list[dict[str, Any]] = [{"name": "b"}, {"enabled": False}, {"labels": {"x": "y"}}]
    others = [rule(**change) for change in changes] + [rule(condition="b"), rule("b")]
    assert len({etag(r) for r in [original, *others]}) == 6


# The store


@pytest.fixture
def store(tmp_path: Path) -> RuleStore:
    store = RuleStore(tmp_path)
    store.load()
    return store


def ids(store: RuleStore, tenant: str = "default") -> list[str]:
    return [rule.id for rule in store.rules(tenant)]


def rewrite(path: Path, text: str) -> None:
    """Write a file so that its signature changes even if the clock is coarse."""
    path.parent.mkdir(exist_ok=True)
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_tenants_by_folder(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "acme/x.yaml", "default/c.yaml", ".git/d.yaml", "acme/x.txt"):
        rewrite(tmp_path / name, text_of(Path(name).stem, f"z{Path(name).stem}"))
    (tmp_path / "Not A Tenant").mkdir()
    (tmp_path / "e.yaml").mkdir()
    os.mkfifo(tmp_path / "f.yaml")
    store = RuleStore(tmp_path)
    assert store.rules("default") == ()
    store.load()
    assert ids(store) == ["a", "za", "b", "zb", "c", "zc"]
    assert ids(store, "acme") == ["x", "zx"]
    assert ids(store, "nobody") == []
    assert store.tenants() == ("acme", "default")
    assert list(store.problems) == [str(tmp_path / "Not A Tenant"), str(tmp_path / "e.yaml")]
    assert store.poll() == set()


def test_changes_are_detected(store: RuleStore, tmp_path: Path) -> None:
    rewrite(tmp_path / "a.yaml", text_of("a"))
    rewrite(tmp_path / "acme/b.yaml", text_of("b"))
    assert store.poll() == {"default", "acme"}
    assert store.poll() == set()
    rewrite(tmp_path / "a.yaml", text_of("a") + "# no change\n")
    assert store.poll() == set()
    rewrite(tmp_path / "a.yaml", text_of("a", condition="b"))
    assert store.poll() == {"default"}
    assert store.rule("default", "a").condition == "b"
    (tmp_path / "acme/b.yaml").unlink()
    assert store.poll() == {"acme"}
    assert store.tenants() == ("default",)


def test_an_invalid_file_keeps_its_last_valid_version(store: RuleStore, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    rewrite(path, text_of("a"))
    rewrite(tmp_path / "b.yaml", "rules: [")
    assert store.poll() == {"default"}
    assert list(store.problems) == [str(tmp_path / "b.yaml")]
    rewrite(path, text_of("a", "x").replace("medium", "hihg"))
    assert store.poll() == set()
    assert ids(store) == ["a"]
    assert "did you mean 'high'?" in store.problems[str(path)]
    rewrite(path, "")
    assert store.poll() == set()
    assert ids(store) == ["a"]
    rewrite(path, text_of("a", "x"))
    rewrite(tmp_path / "b.yaml", text_of("b"))
    assert store.poll() == {"default"}
    assert ids(store) == ["a", "x", "b"]
    assert store.problems == {}


def test_rules_stay_while_the_directory_is_unavailable(tmp_path: Path) -> None:
    directory = tmp_path / "rules"
    store = RuleStore(directory)
    store.load()
    assert "cannot be read: No such file" in store.problems[str(directory)]
    rewrite(directory / "a.yaml", text_of("a"))
    assert store.poll() == {"default"}
    directory.rename(tmp_path / "away")
    assert store.poll() == set()
    assert ids(store) == ["a"]
    assert str(directory) in store.problems
    (tmp_path / "away").rename(directory)
    assert store.poll() == set()
    assert store.problems == {}


def test_a_broken_link_is_reported(store: RuleStore, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "nowhere.yaml")
    assert store.poll() == set()
    assert "cannot be read" in store.problems[str(tmp_path / "a.yaml")]


def test_an_id_may_be_used_only_once_by_a_tenant(store: RuleStore, tmp_path: Path) -> None:
    rewrite(tmp_path / "a.yaml", text_of("x", condition="first"))
    rewrite(tmp_path / "b.yaml", text_of("x", "y", condition="second"))
    rewrite(tmp_path / "acme/c.yaml", text_of("x", condition="third"))
    store.poll()
    assert ids(store) == ["x", "y"]
    assert store.rule("default", "x").condition == "first"
    assert store.rule("acme", "x").condition == "third"
    assert list(store.problems) == [str(tmp_path / "b.yaml")]
    assert "its id is used in" in store.problems[str(tmp_path / "b.yaml")]


def test_a_tenant_has_at_most_1000_rules(store: RuleStore, tmp_path: Path) -> None:
    many = "rules:\n" + "".join(f"- {{id: r{i}, condition: a}}\n" for i in range(MAX_RULES - 1))
    rewrite(tmp_path / "a.yaml", many)
    rewrite(tmp_path / "b.yaml", text_of("x", "y", "z"))
    store.load()
    assert len(ids(store)) == MAX_RULES
    assert ids(store)[-1] == "x"
    assert "more than 1000 rules" in store.problems[str(tmp_path / "b.yaml")]
    with pytest.raises(RuleLimitError, match="delete one first"):
        store.put("default", "w", rule("w"))
    store.put("acme", "w", rule("w"))


# Changes through the API


def test_put_and_delete(store: RuleStore, tmp_path: Path) -> None:
    assert store.put("acme", "a", rule("a", "x\n"))
    assert store.rule("acme", "a") == rule("a", "x\n")
    assert store.poll() == {"acme"}
    assert not store.put("acme", "a", rule("a", "y"))
    assert store.poll() == {"acme"}
    assert store.poll() == set()

    again = RuleStore(tmp_path)
    again.load()
    assert again.rules("acme") == (rule("a", "y"),)

    store.delete("acme", "a")
    assert store.poll() == {"acme"}
    assert ids(store, "acme") == []
    with pytest.raises(RuleNotFoundError, match="no rule 'a'"):
        store.rule("acme", "a")
    with pytest.raises(RuleNotFoundError):
        store.delete("acme", "a")
    assert [r.condition for r in store.versions("acme", "a")] == ["y", "x\n"]
    assert store.put("acme", "a", rule("a", "z"))
    assert len(store.versions("acme", "a")) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_default_tenant_has_a_folder_for_the_api(store: RuleStore, tmp_path: Path) -> None:
    store.put("default", "a", rule("a"))
    assert (tmp_path / "default/a.yaml").exists()
    assert ids(store) == ["a"]


def test_the_api_does_not_change_files_written_by_hand(store: RuleStore, tmp_path: Path) -> None:
    rewrite(tmp_path / "a.yaml", text_of("a"))
    rewrite(tmp_path / "acme/b.yaml", text_of("b", "c"))
    rewrite(tmp_path / "acme/d.yaml", text_of("d"))
    for tenant, rule_id in (("default", "a"), ("acme", "b"), ("acme", "c")):
        with pytest.raises(RuleReadOnlyError, match=r"edit the file .*\.yaml"):
            store.put(tenant, rule_id, rule(rule_id))
        with pytest.raises(RuleReadOnlyError):
            store.delete(tenant, rule_id)
    assert not store.put("acme", "d", rule("d", "new"))  # the file has the name that the API uses
    assert ids(store, "acme") == ["b", "c", "d"]


def test_if_match(store: RuleStore) -> None:
    with pytest.raises(RuleConflictError, match="no rule 'a'"):
        store.put("acme", "a", rule("a"), if_match="*")
    store.put("acme", "a", rule("a", "x"))
    seen = etag(store.rule("acme", "a"))
    store.put("acme", "a", rule("a", "y"), if_match=f'"other", {seen}')
    with pytest.raises(RuleConflictError, match="read it again"):
        store.put("acme", "a", rule("a", "z"), if_match=seen)
    with pytest.raises(RuleConflictError):
        store.delete("acme", "a", if_match=seen)
    assert store.rule("acme", "a").condition == "y"
    store.delete("acme", "a", if_match="*")


def test_if_match_sees_edits_on_disk(store: RuleStore, tmp_path: Path) -> None:
    store.put("acme", "a", rule("a", "x"))
    seen = etag(store.rule("acme", "a"))
    rewrite(tmp_path / "acme/a.yaml", text_of("a", condition="edited"))
    with pytest.raises(RuleConflictError):
        store.put("acme", "a", rule("a", "y"), if_match=seen)


def test_versions_are_kept_up_to_a_limit(store: RuleStore, tmp_path: Path) -> None:
    for i in range(25):
        store.put("acme", "a", rule("a", f"x{i}"))
    assert [r.condition for r in store.versions("acme", "a")] == [f"x{i}" for i in range(23, 3, -1)]
    rewrite(tmp_path / "acme/a.yaml", "rules: [")
    store.put("acme", "a", rule("a", "mended"))
    assert store.versions("acme", "a")[0].condition == "x23"  # the invalid version cannot be read
    assert store.versions("acme", "b") == []


def test_versions_of_deleted_rules_are_kept_up_to_a_limit(
    store: RuleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betrace.service.rules.store.KEPT_DELETED", 2)
    store.put("acme", "stays", rule("stays"))
    store.put("acme", "stays", rule("stays", "b"))
    for name in "abc":
        store.put("acme", name, rule(name))
        store.delete("acme", name)
        folder = tmp_path / "acme/.versions" / name
        os.utime(folder, ns=(ord(name) * 10**9, ord(name) * 10**9))
    store.put("acme", "d", rule("d"))
    store.delete("acme", "d")
    kept = sorted(path.name for path in (tmp_path / "acme/.versions").iterdir())
    assert kept == ["c", "d", "stays"]


def test_a_failed_write_leaves_the_rule_unchanged(
    store: RuleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("acme", "a", rule("a", "x"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put("acme", "a", rule("a", "y"))
    monkeypatch.undo()
    assert store.rule("acme", "a").condition == "x"
    assert store.poll() == {"acme"}  # from the first put
    assert not list(tmp_path.rglob("*.tmp"))


def test_invalid_arguments(store: RuleStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be saved as 'b'"):
        store.put("acme", "b", rule("a"))
    with pytest.raises(ValueError, match="a tenant name is"):
        store.put("../acme", "a", rule("a"))
    with pytest.raises(ValueError, match="a tenant name is"):
        store.delete_tenant("..")
    assert list(tmp_path.iterdir()) == []


def test_a_tenant_is_deleted_with_its_versions(store: RuleStore, tmp_path: Path) -> None:
    store.put("acme", "a", rule("a"))
    store.put("acme", "a", rule("a", "b"))
    store.put("other", "a", rule("a"))
    store.delete_tenant("acme")
    store.delete_tenant("never-there")
    assert store.tenants() == ("other",)
    assert not (tmp_path / "acme").exists()
    assert store.poll() == {"acme", "other"}


def test_definitions_from_the_api() -> None:
    made = make_rule({"id": "a", "condition": "a", "name": None, "labels": None})
    assert (made.name, made.labels) == ("a", {})
    with pytest.raises(RuleFileError) as caught:
        make_rule({"id": "a", "condition": "a &", "x": 1})
    first, second = caught.value.problems
    assert str(first).startswith("rule: rule a: unknown key 'x'")
    assert "the keys of a rule are: id, name" in str(first)
    assert second.syntax is not None
    assert second.syntax.to_json()["column"] == 3
    with pytest.raises(RuleFileError, match="'condition' is missing"):
        make_rule({"id": "a"})


def test_a_linked_folder_is_no_tenant(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "r.yaml").write_text(text_of("r"))
    directory = tmp_path / "rules"
    directory.mkdir()
    (directory / "acme").symlink_to(elsewhere)
    store = RuleStore(directory)
    store.load()
    assert store.tenants() == ()
    assert "link to a folder" in store.problems[str(directory / "acme")]


@pytest.mark.parametrize("tenant", ["default", "a", "b"])
def test_after_a_change_the_rules_are_those_of_a_new_store(tmp_path: Path, tenant: str) -> None:
    """A change reads only its own file; the order of the files, and so which of two rules with
    the same id counts, must be that of a listing."""
    (tmp_path / "m.yaml").write_text(text_of("m", "twice"))
    for folder in ("a", "a-b", "default"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.yaml").write_text(text_of("k", "twice", condition="b"))
        (tmp_path / folder / "bad.yaml").write_text("rules: 7")
    store = RuleStore(tmp_path)
    store.load()
    for rule_id in ("z", "c", "n", "c"):
        store.put(tenant, rule_id, rule(rule_id, "count(x) > 1"))
        fresh = RuleStore(tmp_path)
        fresh.load()
        assert list(fresh._files) == list(store._files)
        assert fresh.all_rules() == store.all_rules()
        assert fresh.problems == store.problems
        assert fresh._origins == store._origins
    assert store.poll() == {tenant}
    assert store.poll() == set()
