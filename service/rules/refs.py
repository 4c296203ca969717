"""Builds attributes and refs from Lark's tree, and checks their scopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lark import Token, Tree

from betrace.service.config.suggest import close_match
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.literals import Literals, joined, unquoted
from betrace.service.rules.syntax import (
    EVENT_FIELDS,
    FIELDS,
    LINK_FIELDS,
    SPAN_FIELDS,
    TRACE_FIELDS,
    Attribute,
    Ref,
    Scope,
)
from betrace.service.rules.tree_tokens import first_token

MAX_DEPTH = 32

SCOPES = ("parent", "root", "trace", "event", "link")
_FIELDS_OF = {"trace": TRACE_FIELDS, "event": EVENT_FIELDS, "link": LINK_FIELDS}


class NotOldRuleError(Exception):
    """The rule relates spans to each other."""


@dataclass(slots=True)
class Place:
    """The place in a rule that is being built."""

    text: str
    related: bool
    """Whether the nodes are those of relational rules."""
    word: str | None = None
    """After ``as``."""
    by: tuple[Ref, ...] = ()
    clause: str = ""
    """when, for_each, always or never."""
    where: int = 0
    """Depth inside where."""
    part: str = ""
    """event or link, inside ``event(…)`` or ``link(…)``."""

    def need(self) -> None:
        """Raise :exc:`NotOldRuleError` unless the rule is built as a relational rule."""
        if not self.related:
            raise NotOldRuleError

    def level(self, level: int, at: Tree[Token]) -> int:
        """The level, unless it is too deep."""
        if level > MAX_DEPTH:
            raise RuleSyntaxError(
                f"the rule nests deeper than {MAX_DEPTH} levels",
                self.text,
                first_token(at).start_pos or 0,
                "simplify it, or split it into several rules",
            )
        return level


class Refs:
    """Builds the attributes and refs of one rule."""

    def __init__(self, place: Place, literals: Literals) -> None:
        self._place = place
        self._literals = literals
        self._error = literals.error

    def attribute(self, tree: Tree[Token]) -> Attribute:
        tokens = [child for child in tree.children if isinstance(child, Token)]
        return self._thing(tokens)

    def bare(self, attribute: Attribute) -> Ref:
        """A name without a scope: of the event or link inside one, else of the span."""
        if not self._place.part or attribute.scope is Scope.FIELD:
            return Ref("", attribute)
        if attribute.scope is Scope.RESOURCE:
            return Ref(self._place.part, Attribute(Scope.ANY, f"resource.{attribute.name}"))
        return Ref(self._place.part, attribute)

    def ref(self, tree: Tree[Token]) -> Ref:
        tokens = [child for child in tree.children if isinstance(child, Token)]
        first = tokens[0]
        match str(tree.data):
            case "attribute" | "quoted_attribute":
                self._own(first)
                return self.bare(self.attribute(tree))
            case "own" | "quoted_own":
                self._own(first)
                return Ref("", self._thing(tokens))
            case "field":
                self._own(first)
                return Ref("", Attribute(Scope.FIELD, self._field(tokens[-1])))
        scope = str(first)[:-1]
        self._check_scope(first, scope)
        attribute = self._scoped(first, scope, tokens[1:])
        if (
            self._place.by
            and scope == self._place.word
            and Ref("", attribute) not in self._place.by
        ):
            known = (
                ", ".join(_own_text(ref) for ref in self._place.by if ref.scope == "") or "no value"
            )
            raise self._error(
                f"{scope}: has only what stands after 'by': {known}",
                first,
                "add it after 'by', or leave 'by' out to judge each span by itself",
            )
        return Ref(scope, attribute)

    def _own(self, at: Token) -> None:
        if not self._place.where:
            raise self._error(
                "found an attribute, but a condition is of the trace and has no span of its own",
                at,
                "name the spans: payment.where(amount > 3), or use root: or trace:",
            )

    def _check_scope(self, at: Token, scope: str) -> None:
        if scope == self._place.word and self._place.clause != "when":
            return
        known = [s for s in SCOPES if s not in ("event", "link") or s == self._place.part]
        if scope == self._place.word:
            raise self._error(
                f"'{scope}:' is a span of 'for each', which 'when' does not know",
                at,
                "move this condition to always or never",
            )
        if scope in ("event", "link") and scope != self._place.part:
            raise self._error(
                f"'{scope}:' is known only inside {scope}(…)", at, f"write {scope}({scope}:… == …)"
            )
        if scope == "parent" and not self._place.where:
            raise self._error(
                "a condition is of the trace, which has no parent",
                at,
                "use it in where: payment.where(parent:tenant == acme)",
            )
        if scope in SCOPES:
            return
        words = [*known, *([self._place.word] if self._place.word else []), "span"]
        meant = close_match(scope, words)
        if scope == "resource":
            hint = "write resource.x for a resource attribute and span:x for a field of the span"
        elif meant:
            hint = f"did you mean '{meant}:'?"
        elif self._place.clause == "for_each":
            hint = "the word after 'as' is known only in always and never"
        else:
            hint = "bind it: for each payment as " + scope
        raise self._error(
            f"found '{scope}:', expected one of " + ", ".join(f"{word}:" for word in words),
            at,
            hint,
        )

    def _scoped(self, first: Token, scope: str, tokens: Sequence[Token]) -> Attribute:
        quoted = tokens[0].type == "STRING"
        fields = _FIELDS_OF.get(scope, SPAN_FIELDS)
        if not quoted and len(tokens) == 1 and tokens[0] in fields:
            return Attribute(Scope.FIELD, str(tokens[0]))
        if scope == "trace":
            meant = close_match(str(tokens[0]), fields)
            raise self._error(
                f"found trace:{joined(tokens)}, expected one of "
                + ", ".join(f"trace:{each}" for each in fields),
                tokens[0],
                f"did you mean 'trace:{meant}'?"
                if meant
                else "a trace has no attributes; use root: for those of its root span",
            )
        if scope in ("event", "link"):
            return Attribute(Scope.ANY, self._literals.plain(tokens, "an attribute"))
        return self._thing(tokens)

    def _thing(self, tokens: Sequence[Token]) -> Attribute:
        """A name after a dot or colon."""
        if tokens[0].type == "STRING":
            return Attribute(Scope.ANY, unquoted(tokens[0]))
        name = self._literals.plain(tokens, "an attribute")
        if len(tokens) > 1 and tokens[0] == "resource":
            return Attribute(Scope.RESOURCE, name.removeprefix("resource."))
        return Attribute(Scope.ANY, name)

    def _field(self, token: Token) -> str:
        if token in SPAN_FIELDS:
            if token not in FIELDS:
                self._place.need()
            return str(token)
        meant = close_match(token, SPAN_FIELDS)
        raise self._error(
            f"found span:{token}, expected one of " + ", ".join(f"span:{f}" for f in SPAN_FIELDS),
            token,
            f"did you mean 'span:{meant}'?" if meant else "write attributes without 'span:'",
        )


def _own_text(ref: Ref) -> str:
    prefix = {Scope.FIELD: "span:", Scope.RESOURCE: "resource."}.get(ref.attribute.scope, "")
    return prefix + ref.attribute.name
