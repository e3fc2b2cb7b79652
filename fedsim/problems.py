"""What is wrong in a scenario, in words for its author."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

__all__ = ["Problem", "choose", "nearest", "problems_of", "shown"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a scenario: where (keys from the top) and what."""

    path: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        where = ".".join(map(str, self.path))
        return f"{where}: {self.message}" if where else self.message


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` most probably meant, None if nothing is near."""
    by_folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(word.casefold(), list(by_folded), n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def shown(value: object, limit: int = 60) -> str:
    """Return `value` as it would be written in a scenario, cut to `limit` characters."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def choose(word: str, noun: str, choices: Iterable[str]) -> str:
    """Return "… is no NOUN; did you mean …? One of: …"."""
    choices = list(choices)
    near = nearest(word, choices)
    meant = f"; did you mean '{near}'?" if near else "."
    return f"'{word}' is no {noun}{meant} One of: {', '.join(choices)}"


def problems_of(
    error: ValidationError,
    path: tuple[str | int, ...],
    keys_at: Callable[[tuple[str | int, ...]], Iterable[str]],
) -> list[Problem]:
    """Return what pydantic found wrong, in words for the author of a scenario.

    Parameters
    ----------
    error : ValidationError
    path : tuple
        Where the checked mapping stands.
    keys_at : callable
        Valid keys of the mapping at a location (relative to `path`).
    """
    found = error.errors(include_url=False)
    meant = {
        (*location[:-1], nearest(str(location[-1]), keys_at(location[:-1])))
        for location in (each["loc"] for each in found if each["type"] == "extra_forbidden")
    }
    said: dict[tuple[str | int, ...], list[str]] = {}
    unions = set()
    for each in found:
        if each["type"] == "missing" and each["loc"] in meant:
            continue
        place = tuple(part for part in each["loc"] if not _UNION_TAG.fullmatch(str(part)))
        said.setdefault(place, []).append(_say(each, keys_at))
        if place != each["loc"]:
            unions.add(place)
    return [
        Problem((*path, *place), _either(sentences))
        for place, sentences in said.items()
        if not (place in unions and any(_is_inside(other, place) for other in said))
    ]


_UNION_TAG = re.compile(r"str|int|float|bool|none|(str|dict|list|tuple|union|literal)\[.*\]")
"""What pydantic adds to the place of a value that may be of several types: the type it tried."""


def _is_inside(other: tuple[str | int, ...], place: tuple[str | int, ...]) -> bool:
    """Return whether something in the value at `place` is wrong: then only that is said of it."""
    return len(other) > len(place) and other[: len(place)] == place


def _either(sentences: Sequence[str]) -> str:
    """Return one sentence for a value that is none of several things it should be."""
    first, *others = dict.fromkeys(sentences)
    return " or ".join([first, *(other.partition(" should be ")[2] or other for other in others)])


def _homes(key: str, keys_at: Callable[[tuple[str | int, ...]], Iterable[str]]) -> str:
    """Return where in the sections of a file a key belongs; nothing if it belongs nowhere."""
    sections = list(keys_at(()))
    below = {name: list(keys_at((name,))) for name in sections}
    return "' or '".join(
        f"{name}.{key}" for name, keys in below.items() if key in keys and keys != sections
    )


def _say(details: ErrorDetails, keys_at: Callable[[tuple[str | int, ...]], Iterable[str]]) -> str:
    """Return one finding of pydantic as a sentence that names the value and what is valid."""
    value, context, location = details["input"], details.get("ctx", {}), details["loc"]
    match details["type"]:
        case "extra_forbidden":
            valid = list(keys_at(location[:-1]))
            near = _homes(str(location[-1]), keys_at) or nearest(str(location[-1]), valid)
            meant = f"; did you mean '{near}'?" if near else "."
            return f"unknown key{meant} Valid: {', '.join(valid) or 'no keys'}"
        case "unexpected_keyword_argument":
            return "unknown key"
        case "missing":
            return "is missing, and has no default"
        case "value_error":
            return str(context["error"])
        case "literal_error" | "enum":
            valid = re.findall(r"'([^']*)'", str(context["expected"]))
            near = nearest(value, valid) if isinstance(value, str) else None
            meant = f"; did you mean '{near}'?" if near else ""
            return f"{shown(value)} should be {context['expected']}{meant}"
        case "union_tag_invalid" if isinstance(value, Mapping):
            said = shown(value["kind"]) if "kind" in value else "missing"
            return f"'kind' is {said}; one of: lognormal, uniform, choice"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{shown(value)} should be a mapping (key: value)"
        case _:
            said = details["msg"].replace("Input should be", "should be")
            return f"{shown(value)} {said[0].lower()}{said[1:]}"
