"""The filter of `/`."""


def matches(text: str, needle: str) -> bool:
    """Whether a filter accepts a text: it contains the needle, in any case. A needle that begins
    with `!` accepts texts that do not contain the rest."""
    inverse, needle = needle.startswith("!"), needle.removeprefix("!").strip().casefold()
    return not needle or (needle in text.casefold()) != inverse
