"""Rule files: YAML with one or more rules, similar to those of Prometheus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from betrace.service.config.suggest import close_match
from betrace.service.rules.definition import Problem, Rule, RuleFileError, make_rule

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_RULES = 1000  # of a tenant
_MAX_YAML_DEPTH = 20
_MAX_YAML_NODES = 200_000  # with aliases expanded
_MAX_PROBLEMS = 100  # reported for a file

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_text(text: str, source: str) -> list[Rule]:
    """The rules in the text of a rule file.

    Raises :exc:`RuleFileError` with up to 100 problems, each with its line if known. ``source`` is
    the name of the file in them.
    """
    _check_size(text, source)
    try:
        _check_shape(text, source)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RuleFileError([_yaml_problem(error, source)]) from None
    items = _rule_nodes(root, source)
    rules: dict[str, Rule] = {}
    problems: list[Problem] = []
    if len(items) > MAX_RULES:
        raise _file_error(source, f"the file has {len(items)} rules, more than {MAX_RULES}")
    for item in items:
        try:
            rule = _load_rule(item, text, source)
        except RuleFileError as error:
            problems += error.problems
            continue
        if rule.id in rules:
            line = item.start_mark.line + 1
            problems.append(Problem(source, "another rule in the file has this id", rule.id, line))
        rules[rule.id] = rule
    if problems:
        raise RuleFileError(problems[:_MAX_PROBLEMS])
    return list(rules.values())


def load_file(path: Path) -> list[Rule]:
    """The rules of a file; raises :exc:`RuleFileError`, also if the file cannot be read."""
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _file_error(source, f"cannot be read: {error.strerror or error}") from None
    try:
        text = data[:MAX_FILE_BYTES].decode("utf-8-sig", "strict")
    except UnicodeDecodeError as error:
        if len(data) <= MAX_FILE_BYTES:
            line = data.count(b"\n", 0, error.start) + 1
            raise RuleFileError([Problem(source, "is not UTF-8 text", line=line)]) from None
    if len(data) > MAX_FILE_BYTES:
        raise _too_large(source)
    return load_text(text, source)


def dump_rules(rules: list[Rule]) -> str:
    """The text of a rule file with these rules; the inverse of :func:`load_text`."""
    definitions = []
    for rule in rules:
        given = {key: value for key, value in rule.definition().items() if value not in ("", {})}
        examples = given.pop("examples", None)  # last, because they are long
        given["condition"] = given.pop("condition", rule.condition)
        definitions.append(given | ({"examples": examples} if examples else {}))
    return yaml.dump(
        {"rules": definitions}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block scalar, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only double-quoted scalars escape control characters and line breaks other than \n.
    lines = text.split("\n")
    style = '"' if not all(map(str.isprintable, lines)) else "|" if len(lines) > 1 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _file_error(source: str, message: str, hint: str | None = None) -> RuleFileError:
    return RuleFileError([Problem(source, message, hint=hint)])


def _too_large(source: str) -> RuleFileError:
    return _file_error(source, f"the file is larger than {MAX_FILE_BYTES} bytes", "split it")


def _check_size(text: str, source: str) -> None:
    try:
        if len(text.encode()) > MAX_FILE_BYTES:
            raise _too_large(source)
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise RuleFileError([Problem(source, "is not Unicode text", line=line)]) from None


def _check_shape(text: str, source: str) -> None:
    """Reject YAML that would grow or nest too far when it is composed."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor of each open collection, nodes before it
    nodes = 0
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.events.AliasEvent):
            size = sizes.get(str(event.anchor))
            if size is None:
                message = f"the alias *{event.anchor} has no anchor before it"
                raise RuleFileError([Problem(source, message, line=line)])
            nodes += size
        elif isinstance(event, yaml.events.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.events.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if len(opened) > _MAX_YAML_DEPTH:
            message = f"nests deeper than {_MAX_YAML_DEPTH} levels"
            raise RuleFileError([Problem(source, message, line=line)])
        if nodes > _MAX_YAML_NODES:
            message = f"has more than {_MAX_YAML_NODES} values with aliases expanded"
            raise RuleFileError([Problem(source, message, line=line)])


def _yaml_problem(error: yaml.YAMLError, source: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return Problem(
        source,
        f"is not valid YAML: {reason}",
        line=mark.line + 1 if mark else None,
        column=mark.column + 1 if mark else None,
    )


def _rule_nodes(root: yaml.Node | None, source: str) -> list[yaml.Node]:
    """The nodes of the rules in a file."""
    hint = "a rule file is a mapping with one key, 'rules'; a file without rules is rules: []"
    if root is None or root.tag == "tag:yaml.org,2002:null":
        raise _file_error(source, "the file is empty", hint)
    if not isinstance(root, yaml.MappingNode):
        raise _file_error(source, "the file is not a mapping", hint)
    problems, found = [], None
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.value != "rules":
            meant = close_match(str(key.value), ["rules"])
            shown = f"did you mean '{meant}'?" if meant else hint
            message = f"unknown key '{str(key.value)[:64]}'"
            problems.append(Problem(source, message, line=line, hint=shown))
        elif found is not None:
            problems.append(Problem(source, "the key 'rules' occurs twice", line=line))
        elif not isinstance(value, yaml.SequenceNode):
            problems.append(Problem(source, "'rules' is not a list", line=line, hint=hint))
        else:
            found = value.value
    if problems:
        raise RuleFileError(problems)
    if found is None:
        raise _file_error(source, "the key 'rules' is missing", hint)
    return list(found)


def _load_rule(node: yaml.Node, text: str, source: str) -> Rule:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        message = "this rule is not a mapping"
        raise RuleFileError([Problem(source, message, line=line, hint="begin with - id: …")])
    keys = {key.value: (key, value) for key, value in node.value if isinstance(key.value, str)}
    if len(keys) < len(node.value):
        message = "a key occurs twice or is not text"
        raise RuleFileError([Problem(source, message, line=line)])
    try:
        definition = yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise RuleFileError([_yaml_problem(error, source)]) from None
    except (ValueError, OverflowError) as error:  # such as an impossible date
        raise RuleFileError([Problem(source, f"is not valid YAML: {error}", line=line)]) from None
    try:
        rule = make_rule({str(key): value for key, value in definition.items()}, source)
    except RuleFileError as error:
        places = {key: name.start_mark.line + 1 for key, (name, _) in keys.items()}
        condition = keys.get("condition")
        raise RuleFileError(
            _at(node, problem)
            if problem.path
            else _placed(problem, line, places, condition[1] if condition else None, text)
            for problem in error.problems
        ) from None
    if not rule.examples or "examples" not in keys:
        return rule
    lines = [each.start_mark.line + 1 for each in keys["examples"][1].value]
    placed = [replace(each, line=at) for each, at in zip(rule.examples, lines, strict=True)]
    return replace(rule, examples=tuple(placed))


def _at(node: yaml.Node, problem: Problem) -> Problem:
    """The problem with the place of the value that its path leads to, or of the last part of the
    path that exists."""
    mark = node.start_mark
    for step in problem.path:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            mark = node.start_mark
        elif isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
            if found is None:
                break
            mark, node = found[0].start_mark, found[1]
        else:
            break
    return replace(problem, line=mark.line + 1, column=mark.column + 1)


def _placed(
    problem: Problem,
    line: int,
    places: dict[str, int],
    condition: yaml.Node | None,
    text: str,
) -> Problem:
    """The problem with its place in the file."""
    if problem.syntax is None or condition is None:
        quoted = problem.message.split("'")
        named = quoted[1] if len(quoted) > 2 else ""  # the first word in quotes is the key
        return replace(problem, line=places.get(named, line))
    start = condition.start_mark
    lines = text.split("\n")
    if isinstance(condition, yaml.ScalarNode) and condition.style == "|":
        # A block scalar begins on the next line, indented.
        at = start.line + problem.syntax.line
        found = lines[at] if at < len(lines) else ""
        indent = found.find(problem.syntax.source) if problem.syntax.source else -1
        column = indent + problem.syntax.column if indent >= 0 else None
        return replace(problem, line=at + 1, column=column)
    return replace(problem, line=start.line + 1)
