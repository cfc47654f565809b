"""The grammar of one ``key=value`` on the command line: lists, inclusive integer ranges, Hydra's sweep functions.

seed=0..49    seed=0..48..2    seed=0..4,9    ohgw.mask=[lr,wd] (one value)    scheduler=glob(*)
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from backends.context import UserError
from harness.schema import GROUPS, LITERAL, as_text, known_keys, near, shown

MAX_CELLS = 100_000  # more is a slip of the pen, and would take minutes to list


@dataclass(frozen=True)
class Override:
    """``key=a,b``: ``texts`` are the elements as written, with ranges and Hydra's sweep functions expanded."""

    key: str
    texts: tuple[str, ...]


def parse_override(argument: str, choices: Callable[[str], list[str]] = lambda group: []) -> Override:
    """Read one ``key=value``; ``choices(group)`` serves ``glob(...)``. UserError for everything that is not one."""
    _refuse_hydra_syntax(argument)
    key, equals, text = argument.partition("=")
    if not equals:
        raise UserError(f"{shown(argument)} is not key=value, as in seed=0..49 (see --help)")
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"{shown(key)} in {shown(argument)} is no key{near(key, _public_keys())}")
    if key in LITERAL:
        texts = [text]
    else:
        text = text.strip()
        texts = [t for element in _split_list(key, text) for t in _expand(key, element, choices)] if text else []
    if not texts or not texts[0]:
        raise UserError(f"{key}= has no value: write {key}=VALUE or leave it out")
    if "\0" in text or (key not in LITERAL and "${" in text):
        raise UserError(f"{key}={shown(text)}: interpolations and NUL characters are not possible on the command line")
    return Override(key, tuple(texts))


def _refuse_hydra_syntax(argument: str) -> None:
    """Answer what works in plain Hydra and not here."""
    if match := re.match(r"(\+\+?|~)", argument):
        key = argument.lstrip("+~").partition("=")[0]
        does = "removes" if match[0] == "~" else "adds"
        known = key in _public_keys()
        advice = near(key, _public_keys())
        if known:
            advice = f"; leave {key} out to get its default" if match[0] == "~" else f"; write {argument.lstrip('+')}"
        raise UserError(f"{shown(argument)}: {match[0]} {does} keys in Hydra, here the keys are fixed{advice}")
    if re.match(r"hydra\b", argument):
        raise UserError(
            f"{shown(argument)}: Hydra's own settings have no effect here; results_dir and name say where results go"
        )


def _split_list(key: str, text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    elements, depth, quote, start = [], [], "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth.append(")]}"["([{".index(c)])
        elif c in ")]}":
            if not depth or depth.pop() != c:
                raise UserError(f"{key}={text}: {c!r} closes a bracket that is not open")
        elif c == "," and not depth:
            elements.append(text[start:i].strip())
            start = i + 1
    if quote or depth:
        raise UserError(f"{key}={text}: {quote or depth[-1]!r} is missing")
    elements.append(text[start:].strip())
    if not all(elements):
        raise UserError(f"{key}={text}: an element of the list is empty")
    return elements


def _expand(key: str, element: str, choices: Callable[[str], list[str]]) -> list[str]:
    """The elements that a range or one of Hydra's sweep functions stands for."""
    if match := re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?", element):
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if step < 1:
            raise UserError(f"{key}={element}: the step of a range must be at least 1")
        if first > last:
            raise UserError(f"{key}={element} is an empty range; write {key}={last}..{first}")
        if (last - first) // step >= MAX_CELLS:
            count = (last - first) // step + 1
            raise UserError(f"{key}={element} names {count} values; at most {MAX_CELLS} are possible")
        return [str(i) for i in range(first, last + 1, step)]
    if re.fullmatch(r"[A-Za-z_]+\s*\(.*\)", element, re.DOTALL):
        return _hydra_function(key, element, choices)
    return [element]


def _hydra_function(key: str, element: str, choices: Callable[[str], list[str]]) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={element}")
        value = override.value()
        if isinstance(value, Glob):
            values: Sequence[Any] = value.filter(choices(key))
        elif override.is_discrete_sweep():
            values = list(itertools.islice(override.sweep_iterator(), MAX_CELLS + 1))
        elif override.is_sweep_override():
            raise UserError(f"{key}={element} has no end: give a list or a range such as 0..4")
        else:
            values = [value]
    except HydraException:
        functions = "choice(a,b), range(0,5), glob(*), sort(a,b) and casts such as int(3)"
        raise UserError(f"{key}={element}: no such function, or wrong arguments; possible: {functions}") from None
    if not values:
        raise UserError(f"{key}={element} names nothing; possible: {', '.join(choices(key))}")
    return [as_text(v) for v in values]


def _public_keys() -> list[str]:
    return [*GROUPS, *known_keys()]
