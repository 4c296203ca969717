"""Children and tokens of Lark's trees."""

from __future__ import annotations

from lark import Token, Tree


def as_tree(child: Token | Tree[Token]) -> Tree[Token]:
    """A child that is a tree."""
    assert isinstance(child, Tree)
    return child


def first_token(tree: Tree[Token]) -> Token:
    """The first token of a tree."""
    node: Token | Tree[Token] = tree
    while isinstance(node, Tree):  # a loop, because a rejected tree may be deep
        node = node.children[0]
    return node


def last_token(tree: Tree[Token]) -> Token:
    """The last token of a tree."""
    node: Token | Tree[Token] = tree
    while isinstance(node, Tree):
        node = node.children[-1]
    return node
