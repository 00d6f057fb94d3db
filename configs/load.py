"""From a YAML file and command-line overrides to a checked `Config`, and back to YAML.

Owns the YAML rules (the core types of YAML 1.2; no duplicate keys, aliases or tags), the inheritance by `base:` and the
one-sentence errors. Later wins: bases in their order, the file, `--opts`, replacements.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError

from configs.aug_schema import auto_augment_section, color_jitter_section
from configs.errors import UserError
from configs.schema import Config, walk

KeyPath = tuple[str, ...]
# Sections that one value may stand for.
SHORTHANDS = {("aug", "color_jitter"): color_jitter_section, ("aug", "auto"): auto_augment_section}

_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_NUMBERS_TAG = "!numbers"  # (0.9, 0.999), as the homework's configs write a pair
_CORE_TYPES = {  # YAML 1.2: 1e-3 is a float, off and no are strings, 010 is ten
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+",
    "tag:yaml.org,2002:float": _NUMBER,
    _NUMBERS_TAG: rf"\(\s*{_NUMBER}\s*(?:,\s*{_NUMBER}\s*)*,?\s*\)",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str | None, Any] = {}  # noqa: RUF012 (PyYAML's own attribute; drops its YAML 1.1 types)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # also keeps out recursive and exponentially growing documents
            problem = "aliases are not supported; use base: for shared parts"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that would be another type in YAML 1.1 or 1.2."""


for _tag, _pattern in _CORE_TYPES.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)


def load_config(path: str | Path, overrides: Sequence[str] = (), **replacements: Any) -> Config:
    """Load a config file with its bases, then apply overrides, then replacements; `name` defaults to the file's stem.

    Args:
        overrides: the items after `--opts`: `train.epochs=5` or the pair `train.epochs`, `5`, in any mixture.
        replacements: top-level or, through `**{...}`, dotted keys; a mapping is merged into its section, and None
            stands for a command-line flag that was not given.

    Raises:
        UserError: anything wrong with the file, a base or a value.
    """
    path = Path(path)
    values, origins = _read(path, ())
    layers = [(layer, "--opts") for layer in _parse_overrides(overrides)]
    layers += [(_nested(key, value), "argument") for key, value in replacements.items() if value is not None]
    for layer, origin in layers:
        values = _merge(values, layer)
        origins.update(dict.fromkeys(_paths(layer), origin))
    for section in ("data", "model"):
        values.setdefault(section, {})  # so that an error names the missing field and not only the section
    if values.get("name") is None:
        values["name"] = path.stem
    return _validated(values, origins, str(path))


def parse_config(text: str, source: str) -> Config:
    """The config that `to_yaml` wrote, as checkpoints hold it; source: where it comes from, for the error."""
    values, lines = _parse(text, source)
    return _validated(values, {key: f"{source}:{line}" for key, line in lines.items()}, source)


def _validated(values: Any, origins: Mapping[KeyPath, str], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _error(_describe(error, origins, source)) from None


def to_yaml(config: Config) -> str:
    """Return the whole config as YAML that loads back to an equal config."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _error(message: str) -> UserError:
    return UserError(" ".join(message.split()))  # one line, whatever the file held


def _read(path: Path, including: tuple[Path, ...]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Read a file and its bases: the merged values, and for each key the file and line it came from."""
    place = f"{including[-1]}: base {path}" if including else str(path)
    if path.resolve() in [file.resolve() for file in including]:
        raise _error(f"{place} is a cycle ({' -> '.join(map(str, (*including, path)))}); remove one of these bases")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _error(f"{place} cannot be read ({error.strerror}); give the path of a YAML file") from None
    except ValueError as error:
        raise _error(f"{place} is not a UTF-8 text file ({error})") from None
    own, lines = _parse(text, str(path))
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise _error(f"{path} holds {_show(own)}, but a config is a mapping such as `train: {{epochs: 5}}`")
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise _error(f"{path}:{lines[('base',)]}: base={_show(bases)} must be a file name or a list of file names")
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for base in bases:
        base_values, base_origins = _read(path.parent / base, (*including, path))
        values = _merge(values, base_values)
        origins.update(base_origins)
    origins.update({key: f"{path}:{line}" for key, line in lines.items()})
    return _merge(values, own), origins


def _parse(text: str, source: str, line_numbers: bool = True) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document: its value, and the line of each key; errors name the source and, if wanted, the line."""
    lines: dict[KeyPath, int] = {}
    try:
        node = _Loader(text).get_single_node()
        return (None if node is None else _construct(node, (), lines)), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(f"{source}:{line}: character U+{error.character:04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark and line_numbers else source
        raise _error(f"{where}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except RecursionError:
        raise _error(f"{source}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets chr() and int() fail on bad escapes
        raise _error(f"{source} is not valid YAML ({error})") from None


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _construct_mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_construct(item, path, {}) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and re.fullmatch(_CORE_TYPES.get(node.tag, "(?s:.*)"), node.value):
        text = node.value
        if kind in ("null", "str"):
            return None if kind == "null" else text
        if kind in ("int", "float"):
            return int(text) if kind == "int" else float(text)
        if kind == "bool":
            return text.lower() == "true"
        if kind == _NUMBERS_TAG:
            return [_parse(item, text)[0] for item in re.findall(_NUMBER, text)]
    raise yaml.MarkedYAMLError(problem=f"tag {node.tag} is not allowed here", problem_mark=node.start_mark)


def _construct_mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _construct(key_node, (), {})
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {_show(key)} must be text", problem_mark=key_node.start_mark)
        key_path = (*path, key)
        if key in values:
            problem = f"key {'.'.join(key_path)} is given twice (first in line {lines[key_path]}); keep one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        lines[key_path] = key_node.start_mark.line + 1
        values[key] = _construct(value_node, key_path, lines)
    return values


def _parse_overrides(items: Sequence[str]) -> Iterator[dict[str, Any]]:
    remaining = iter(items)
    for item in remaining:
        key, *value = item.split("=", 1)
        text = value[0] if value else next(remaining, None)
        if not key or text is None:
            raise _error(f"--opts: {item!r} lacks a {'value' if key else 'key'}; write KEY=VALUE or KEY VALUE")
        yield _nested(key, _parse(text, f"--opts: {key}={text}", line_numbers=False)[0])


def _nested(dotted_key: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted_key.split(".")):
        value = {key: value}
    return dict(value)


def _merge(old: Any, new: Any, path: KeyPath = ()) -> Any:
    """Return `new` laid over `old`: mappings are merged key by key, anything else is replaced."""
    if path in SHORTHANDS:
        old = SHORTHANDS[path](old)  # so that a hue can be added to the one number
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {**old, **{key: _merge(old.get(key), value, (*path, key)) for key, value in new.items()}}


def _paths(values: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if path:
        yield path
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _paths(value, (*path, key))


def _describe(error: ValidationError, origins: Mapping[KeyPath, str], path: str) -> str:
    """One sentence for the first error: where, key, value, what is allowed; and how many more there are."""
    errors = error.errors(include_url=False)
    errors.sort(key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    first = errors[0]
    key_path = tuple(part for part in first["loc"] if isinstance(part, str))  # without positions in a list
    origin = next((origins[key_path[:n]] for n in range(len(key_path), 0, -1) if key_path[:n] in origins), path)
    dotted = ".".join(key_path)
    if first["type"] == "extra_forbidden":
        sentence = f"{dotted}={_show(first['input'])} is unknown; {_allowed_keys(key_path)}"
    elif first["type"] == "missing":
        sentence = f"{dotted} is missing: {dict(walk())[dotted].description}"
    else:
        sentence = f"{dotted}={_show(first['input'])} {_requirement(first, dotted)}"
    more = f" (and {len(errors) - 1} more error{'s' * (len(errors) > 2)})" if len(errors) > 1 else ""
    return f"{origin}: {sentence.rstrip('.')}{more}"


def _requirement(problem: Any, dotted: str) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"must be a section; {_allowed_keys((*dotted.split('.'), ''))}"
    message = str(problem["msg"]).replace("Input should be", "must be").replace("String should have", "must have")
    message = message.replace("a valid tuple", "a list, such as [first, second]")
    message += " or null" * ("None" in str(dict(walk())[dotted].annotation))
    if problem["type"] == "string_type" and type(problem["input"]) in (int, float, bool):
        message += f'; quote it: "{_show(problem["input"])}"'
    return message


def _allowed_keys(key_path: KeyPath) -> str:
    """For an unknown key: the closest known keys and all keys of its section."""
    *parents, leaf = key_path
    prefix = "".join(f"{parent}." for parent in parents)
    known = [key for key, _ in walk()]
    siblings = [key.removeprefix(prefix) for key in known if key.startswith(prefix) and "." not in key[len(prefix) :]]
    elsewhere = [key for key in known if leaf and key.endswith(f".{leaf.lower()}")]
    close = [prefix + key for key in difflib.get_close_matches(leaf.lower(), siblings, n=2)]
    guess = f"did you mean {' or '.join(dict.fromkeys(elsewhere + close))}? " if elsewhere or close else ""
    if "." in leaf:
        guess = "a file nests sections instead of dots; "
    return f"{guess}allowed in {prefix.rstrip('.') or 'the config'}: {', '.join(siblings)}"


def _show(value: Any) -> str:
    """Return the value as YAML would write it in one line, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
