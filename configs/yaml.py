"""Parse YAML text to plain values, and write plain values as YAML.

Scalars have the types of YAML 1.2, except that hexadecimal, octal, infinite and nan numbers are read as text. In
addition, None is null, and numbers in parentheses are a list. Aliases and custom tags are errors. A repeated key is an
error, unless its top-level key is uppercase, as in the homework's configs. In that case, the last value counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from configs.suggestions import KeyPath, format_value, one_line_error


@dataclass
class Document:
    """A parsed YAML document."""

    source: str  # its name in messages
    value: object = None
    lines: dict[KeyPath, int] = field(default_factory=dict)  # line of each key, counted from 1
    warnings: list[str] = field(default_factory=list)  # about repeated keys

    @property
    def origins(self) -> dict[KeyPath, str]:
        """Source and line of each key."""
        return {key: f"{self.source}:{line}" for key, line in self.lines.items()}


_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
MAX_CHARACTERS = 1 << 18  # of a document; parsing this many takes about 5 s, and configs have at most 5,000
MAX_DEPTH = 50  # of nested values
_INT = r"[-+]?[0-9]+"
_NUMBERS_TAG = "!numbers"  # (0.9, 0.999), as the homework's configs write a pair
_CORE_TYPES = {  # YAML 1.2: 1e-3 is a float, off and no are strings, 010 is ten
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|None|",  # None: Python's and W&B's spelling
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": _INT,
    "tag:yaml.org,2002:float": _NUMBER,
    _NUMBERS_TAG: rf"\(\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*(?:\s*,)?\s*\)",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str | None, object] = {}  # noqa: RUF012 (PyYAML's attribute; drops YAML 1.1 types)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        problem = "nested too deeply" if self._depth > MAX_DEPTH else None
        if self.check_event(yaml.AliasEvent):  # this also rules out recursive and exponentially growing documents
            problem = "aliases are not supported; use base: for shared parts"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _ValueLoader(_Loader):
    """Loader for command-line values. It rejects comments, which would truncate the value."""

    def scan_to_next_token(self) -> None:
        begin = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[begin : self.pointer]:
            raise yaml.MarkedYAMLError(
                problem="# does not start a comment here; put the text that contains it in quotes"
            )


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes a string if YAML 1.1 or 1.2 would read it as a different type."""


for _tag, _pattern in _CORE_TYPES.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)


def dump(values: object) -> str:
    """Return plain values as YAML. Keys keep their order."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def parse(text: str, source: str, *, is_value: bool = False) -> Document:
    """Parse one YAML document, or with `is_value` a value from the command line, in which comments are errors.

    Raises:
        UserError: The document is invalid or too long. The message names `source` and, for a document, the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise one_line_error(f"{source} has {len(text):,} characters; a config may have at most {MAX_CHARACTERS:,}")
    document = Document(source)
    try:
        if (node := (_ValueLoader if is_value else _Loader)(text).get_single_node()) is not None:
            document.value = _construct(node, (), document)
        return document
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise one_line_error(f"{source}:{line}: character U+{error.character:04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark and not is_value else source
        raise one_line_error(f"{where}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except RecursionError:
        raise one_line_error(f"{source}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # chr() and int() also fail on bad escapes
        raise one_line_error(f"{source} is not valid YAML ({error})") from None


def parse_value(text: str, source: str) -> object:
    """Parse one command-line value, in which `#` does not start a comment and a leading `&` does not start an anchor.

    Raises:
        UserError: The value is empty, invalid or too long. The message names `source`.
    """
    text = text.strip()
    if not text:
        raise one_line_error(f"{source} has an empty value; write null for none, or '\"\"' for an empty text")
    if text[0] == "&" or ("#" in text and text[0] not in "[{\"'"):  # text, not an anchor, number or null
        text = "'" + text.replace("'", "''") + "'"
    value = parse(text, source, is_value=True).value
    if value is None and not re.fullmatch(_CORE_TYPES["tag:yaml.org,2002:null"], text):  # e.g. ---
        return text
    return value


def _construct(node: yaml.Node, path: KeyPath, document: Document) -> object:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _construct_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_construct(item, path, Document(document.source)) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and re.fullmatch(_CORE_TYPES.get(node.tag, "(?s:.*)"), node.value):
        text = node.value
        if kind == "null":
            return None
        if kind == "str":
            return text
        if kind in ("int", "float"):
            return _number(text, node)
        if kind == "bool":
            return text.lower() == "true"
        if kind == _NUMBERS_TAG:
            return [_number(item, node) for item in re.findall(_NUMBER, text)]
    raise yaml.MarkedYAMLError(problem=f"tag {node.tag} is not allowed here", problem_mark=node.start_mark)


def _number(text: str, node: yaml.Node) -> int | float:
    if not re.fullmatch(_INT, text):
        return float(text)
    if abs(number := int(text)) >= 1 << 64:  # no setting needs it, and computations could overflow
        raise yaml.MarkedYAMLError(problem=f"the number {text[:20]}… is too large", problem_mark=node.start_mark)
    return number


def _construct_mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, object]:
    values: dict[str, object] = {}
    lines = document.lines
    for key_node, value_node in node.value:
        key, line = _construct(key_node, (), Document(document.source)), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(
                problem=f"key {format_value(key)} must be text", problem_mark=key_node.start_mark
            )
        key_path = (*path, key)
        if key in values:
            problem = f"{'.'.join(key_path)} is given twice (first in line {lines[key_path]})"
            if not key_path[0].isupper():
                raise yaml.MarkedYAMLError(problem=f"key {problem}; keep one", problem_mark=key_node.start_mark)
            document.warnings.append(f"{document.source}:{line}: {problem}; the last one counts")
        lines[key_path] = line
        values[key] = _construct(value_node, key_path, document)
    return values
