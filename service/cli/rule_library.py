"""``betrace rules library``: rules to start from, with examples. They are in ``library/``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import click

from betrace.service.cli.common import (
    HELP,
    Failure,
    json_option,
    print_json,
    print_lines,
    print_table,
)
from betrace.service.config.suggest import close_match
from betrace.service.rules.definition import Rule
from betrace.service.rules.yaml_file import load_text

THEMES = {
    "payments": "payments",
    "data-access": "data access and compliance",
    "ai-agents": "AI agents and LLM calls",
    "messaging": "messaging",
    "databases": "databases",
    "reliability": "reliability",
}
"""The themes by the name of their file, in the order in which they are listed."""

_BEGIN = re.compile(r"^  - id: (\S+)$", re.MULTILINE)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LibraryRule:
    """A rule, and a rule file with it alone."""

    theme: str
    rule: Rule
    text: str

    def to_json(self) -> Json:
        """The rule as in a rule file, with its theme."""
        return {"theme": self.theme, **self.rule.definition()}


@click.group("library", context_settings=HELP, invoke_without_command=True)
@json_option
@click.pass_context
def library(context: click.Context, as_json: bool) -> None:
    """List rules to start from, by theme.

    `show` prints one as a rule file, with examples of traces that keep and break it.

    \b
    Examples:
      betrace rules library
      betrace rules library show n-plus-one >rules/n-plus-one.yaml
    """
    if context.invoked_subcommand is not None:
        return
    found = library_rules()
    if as_json:
        print_json({"rules": [each.to_json() for each in found]}, indent=2)
        return
    print_table(
        ("THEME", "NAME", "SEVERITY", "WHAT IT SAYS"),
        [(each.theme, each.rule.id, each.rule.severity, each.rule.name) for each in found],
    )


@library.command("show")
@click.argument("name", metavar="NAME")
@json_option
def library_show(name: str, as_json: bool) -> None:
    """Print a rule of the library as a rule file.

    \b
    Example:
      betrace rules library show double-charge >rules/double-charge.yaml
    """
    found = library_rules()
    for each in found:
        if each.rule.id == name:
            if as_json:
                print_json(each.to_json(), indent=2)
            else:
                print_lines(each.text.rstrip("\n").split("\n"))
            return
    meant = close_match(name, [each.rule.id for each in found])
    hint = f"did you mean '{meant}'?" if meant else "list them: betrace rules library"
    raise Failure(f"the library has no rule '{name}'; {hint}")


def library_rules() -> Sequence[LibraryRule]:
    """All rules, by theme."""
    folder = resources.files("betrace.service.cli").joinpath("library")
    return [
        each
        for file, theme in THEMES.items()
        for each in _rules(theme, folder.joinpath(f"{file}.yaml").read_text("utf-8"))
    ]


def _rules(theme: str, text: str) -> Iterator[LibraryRule]:
    begins = [(match[1], match.start()) for match in _BEGIN.finditer(text)]
    ends = [*(start for _, start in begins[1:]), len(text)]
    texts = {
        name: "rules:\n" + text[start:end].rstrip() + "\n"
        for (name, start), end in zip(begins, ends, strict=True)
    }
    for rule in load_text(text, theme):
        yield LibraryRule(theme, rule, texts[rule.id])
