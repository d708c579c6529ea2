"""Read what a user wrote, YAML and JSON, within bounds; whatever is wrong with it is one line with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ablate.config.errors import ConfigError, echo, reason

LARGEST_STUDY = 2**20
"""Bytes of a YAML file."""
MOST_VALUES = 200_000
"""Values of a YAML file, each alias counted as often as it is used."""
DEEPEST = 64
"""Levels of nesting of a YAML file."""
LONGEST_NUMBER = 1000
"""Characters of a number."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def read_text(path: Path, where: str, limit: int = LARGEST_STUDY) -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes (also of a device or a pipe); `where` names it in errors.

    Raises:
        ConfigError: the file cannot be read, is larger, or is not text in UTF-8.
        FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{where} cannot be read: {reason(error)}") from None
    if len(content) > limit:
        raise ConfigError(f"{where} is larger than {limit:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where} is not text in UTF-8: byte 0x{content[error.start]:02x} at line {line}") from None


def load_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says.

    Raises:
        ConfigError: the text is not YAML, sets a key twice, holds a character that is not text, or is too large for a
            file that a person wrote; with the line.
    """
    try:
        return _load(text, where)
    except ConfigError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where} is not YAML at line {line}: a control character, U+{error.character:04X}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not readable"
        raise ConfigError(f"{where} is not YAML{place}: {what}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deep: {DEEPEST} levels are allowed") from None
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # The constructors of PyYAML, on a date without such a day or a tag that its value does not fit.
        raise ConfigError(f"{where} is not YAML: {reason(error)}") from None


def load_json(text: str, where: str) -> Any:
    """Return what a JSON text says; raises ConfigError with the place for what is none, or nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ConfigError(f"{where} is not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ConfigError(f"{where} is not JSON: it is nested too deep") from None
    except ValueError as error:  # a whole number of too many digits
        raise ConfigError(f"{where} is not JSON: {reason(error)}") from None


def is_text(value: str) -> bool:
    """Return whether a string can be written as UTF-8: JSON's escapes can also spell half a character."""
    return not _SURROGATE.search(value)


def whole(value: str) -> str:
    r"""Return a string with two halves of a character (`\ud83d\ude00`, as JSON spells an emoji) put together."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") if not is_text(value) else value


def _load(text: str, where: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(root: yaml.Node, where: str) -> None:
    """Look at a YAML document before anything is built from it."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, level: int) -> int:
        line = node.start_mark.line + 1
        if id(node) in open_nodes:
            raise ConfigError(f"{where} is not usable: a value holds itself at line {line}")
        if id(node) in sizes:
            return sizes[id(node)]
        if level > DEEPEST:
            raise ConfigError(f"{where} is nested too deep at line {line}: {DEEPEST} levels are allowed")
        open_nodes.add(id(node))
        count = 1
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node, where, line)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
        for child in _children(node):
            count += size(child, level + 1)
            if count > MOST_VALUES:
                raise ConfigError(f"{where} holds over {MOST_VALUES:,} values at line {line}, aliases written out")
        open_nodes.remove(id(node))
        sizes[id(node)] = count
        return count

    size(root, 0)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _check_scalar(node: yaml.ScalarNode, where: str, line: int) -> None:
    node.value = whole(node.value)
    if found := _SURROGATE.search(node.value) or _CONTROL.search(node.value):
        kind = "half a character" if _SURROGATE.match(found[0]) else "a control character"
        raise ConfigError(f"{where} is not text at line {line}: {kind}, U+{ord(found[0]):04X}")
    if node.tag in {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"} and len(node.value) > LONGEST_NUMBER:
        raise ConfigError(f"{where} has a number of {len(node.value):,} characters at line {line}")


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where} is not usable: a key at line {line} is a list or a mapping")
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = (key.tag, key.value)
        if name in seen:
            raise ConfigError(f"{where} sets {echo(key.value)} twice, at lines {seen[name]} and {line}")
        seen[name] = line
