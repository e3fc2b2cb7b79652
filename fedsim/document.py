"""YAML text as plain values: safely, with the line that each value stands on.

Decision: plain words are read by the rules of YAML 1.2 (`on` is a word, `1e-3` is a number),
because those are the rules of the editors that people write it in. Tags, duplicate keys and
oversized files are refused; anchors are allowed as long as what they expand to stays small.
"""

import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fedsim.errors import ScenarioError

__all__ = ["Document", "Place", "read_document", "read_value", "write_yaml"]

Place = tuple[str | int, ...]

_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and the line on which it says so."""

    data: dict[str, Any]
    origin: dict[Place, str]
    source: str


class _Loader(yaml.SafeLoader):
    """Reads plain words by the rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""

    yaml_implicit_resolvers = deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)


_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)",
        list("-+.0123456789"),
    ),
}
for _word, (_pattern, _first) in _WORDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_word}", re.compile(rf"^(?:{_pattern})$"), _first
        )


def read_document(path: Path) -> Document:
    """Return the mapping in a YAML file with the line of each key.

    Raises
    ------
    ScenarioError
        If the file cannot be read, is empty, is not YAML or uses what is not allowed.
    """
    source = str(path)
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise ScenarioError(f"{source} is larger than {_MAX_BYTES} bytes: that is no scenario")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"cannot read {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{source} is not text in UTF-8") from error
    root = _compose(text, source)
    if root is None:
        raise ScenarioError(f"{source} is empty; 'fedsim init' writes a scenario to start from")
    if not isinstance(root, yaml.MappingNode):
        raise ScenarioError(f"{source}: a scenario is a mapping (key: value), starting at the top")
    reader = _Reader(source)
    return Document(reader.value(root, (), ()), reader.origin, source)


def read_value(text: str, source: str) -> Any:
    """Return the value that a YAML text stands for; `source` names it in errors."""
    root = _compose(text, source)
    return None if root is None else _Reader(source).value(root, (), ())


def write_yaml(data: dict[str, Any]) -> str:
    """Return plain values as YAML that `read_document` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.TagToken):
                line = token.start_mark.line + 1
                raise ScenarioError(f"{source}, line {line}: YAML tags ('!…') are not allowed")
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ScenarioError(f"{source}{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ScenarioError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ScenarioError(f"{source}: nested too deeply") from error


class _Reader:
    """Turns YAML nodes into plain values; knows where each came from."""

    def __init__(self, source: str) -> None:
        self.origin: dict[Place, str] = {}
        self._source = source
        self._count = 0

    def value(self, node: yaml.Node, path: Place, above: tuple[yaml.Node, ...]) -> Any:
        """Return the value of a node at `path`, inside the nodes `above`."""
        self._count += 1
        if self._count > _MAX_VALUES:
            raise self._error(node, f"expands to more than {_MAX_VALUES} values (through aliases?)")
        if node in above:
            raise self._error(node, "an alias refers to what it is part of")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, (*path, index), above) for index, item in enumerate(node.value)
            ]
        return _scalar(node)

    def _mapping(
        self, node: yaml.MappingNode, path: Place, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self._error(
                    key_node, f"a key{'' if key is None else f' ({key})'} should be text"
                )
            if key in found:
                raise self._error(key_node, f"the key '{key}' appears twice in one mapping")
            self.origin.setdefault((*path, key), f"line {key_node.start_mark.line + 1}")
            found[key] = self.value(value_node, (*path, key), above)
        return found

    def _error(self, node: yaml.Node, said: str) -> ScenarioError:
        return ScenarioError(f"{self._source}, line {node.start_mark.line + 1}: {said}")


def _scalar(node: yaml.Node) -> Any:
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        case "float":
            return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf"))
        case _:
            return text
