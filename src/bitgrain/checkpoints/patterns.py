"""Patterns of module names that a checkpoint's config.json brings along: matched, but never trusted with our time."""

from __future__ import annotations

import re

from bitgrain.errors import CheckpointError

_LONGEST = 500
"""Characters of a pattern, and of a name that is matched."""
_REPEATS = 6
"""How many `*`, `+`, `?` and `{..}` a pattern may have: names are short, so that no search is long."""
_NESTED = re.compile(r"\)(?:[*+?]|\{\d)")
_REPEAT = re.compile(r"(?<!\\)(?:(?<!\()[*+?]|\{\d)")


def name_matches(pattern: str, name: str) -> bool:
    """Whether the regular expression `pattern` matches at the start of `name`, as Python's `re.match`.

    Raises CheckpointError for a pattern that is none, or that could search for long: a repeated group, very many
    repeats, or thousands of characters.
    """
    if len(pattern) > _LONGEST or len(name) > _LONGEST:
        raise CheckpointError(f"config.json: the pattern {pattern[:60]!r} ... or what it is for is too long to match")
    if _NESTED.search(pattern) or len(_REPEAT.findall(pattern)) > _REPEATS:
        raise CheckpointError(
            f"config.json: the pattern {pattern!r} repeats groups, or too often; name modules plainly"
        )
    try:
        return re.match(pattern, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"config.json: {pattern!r} is no regular expression: {error}") from error
