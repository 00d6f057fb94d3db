"""Load a validated `Config` from a YAML file and command-line overrides, and write a config to YAML.

Settings are merged in this order, with later ones taking precedence: bases (`base:`), the file, `--opts`, and the
keyword arguments of `load_config`. Uppercase keys are homework keys, which `configs.homework` translates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import yaml
from configs.homework import translate
from configs.homework_keys import KEYS, HomeworkValue, flatten_keys
from configs.schema import Config
from configs.schema.aug import auto_augment_section, color_jitter_section
from configs.suggestions import KeyPath, format_value, one_line_error
from configs.utils.files import path_argument
from configs.utils.warnings import warn
from configs.validation import describe_error

SUFFIXES = (".yaml", ".yml")  # allowed for bases
MAX_FILES = 64  # per config, since nested bases could multiply to millions
MAX_KEY_DEPTH = 50  # dots in a dotted key
# Sections that may be given as a single value.
SHORTHANDS = {("aug", "color_jitter"): color_jitter_section, ("aug", "auto"): auto_augment_section}


@dataclass(frozen=True)
class _Layer:
    """Settings from one source, or merged from several sources."""

    settings: dict[str, object]  # nested; keys in lower case
    origins: dict[KeyPath, str]  # per key: file and line, --opts, or argument
    homework_values: dict[str, HomeworkValue]  # by the homework's dotted keys
    is_homework: bool  # a file has homework keys, so the homework's defaults apply
    warnings: list[str]


def load_config(path: str | Path | Config, overrides: Sequence[str] = (), **replacements: object) -> Config:
    """Load a config file with its bases, apply overrides and then replacements, and validate the result.

    Args:
        path: YAML file, whose name without suffix is the default of `name`, or a config.
        overrides: Items after `--opts`, e.g. `train.epochs=5`, or `train.epochs` followed by `5`. Homework keys are
            also allowed.
        replacements: Values by top-level key or, with `**{...}`, by dotted key. A mapping is merged into its section.
            None is ignored.

    Raises:
        UserError: The file, a base or a value is missing or invalid.
    """
    if isinstance(path, Config):
        source, layers = "config", [_layer(path.model_dump(mode="json"), "config")]
    else:
        path = path_argument(str(path))
        source, layers = str(path), [_read_file(path, (), [])]
    for key, text in split_overrides(overrides):
        layers.append(_layer(_nested(key, yaml.parse_value(text, f"--opts: {key}={text}")), "--opts"))
    layers += [_layer(_nested(key, value), "argument") for key, value in replacements.items() if value is not None]
    layer = reduce(_overlay, layers)
    values, origins, warnings = layer.settings, dict(layer.origins), layer.warnings
    labels: dict[KeyPath, str] = {}
    if layer.homework_values or layer.is_homework:
        translation = translate(layer.homework_values, values, layer.is_homework, source)
        values = reduce(_merge, [_nested(key, value) for key, value in translation.values.items()] + [values])
        for key, (label, origin) in translation.sources.items():
            key_path = tuple(key.split("."))
            labels[key_path], origins[key_path] = label, origin
        warnings = warnings + translation.warnings
    for section in ("data", "model"):
        values.setdefault(section, {})  # so that errors name the missing field instead of the section
    if values.get("name") is None:
        values["name"] = Path(source).stem
    config = _validate(values, origins, labels, source)
    for text in [*warnings, *_cut_warm_up(config, values, origins, labels)]:
        warn(text)
    return config


def _cut_warm_up(
    config: Config, values: Mapping[str, Any], origins: Mapping[KeyPath, str], labels: Mapping[KeyPath, str]
) -> list[str]:
    """Return a list with a warning if the warm-up in `values` is longer than the run, or an empty list."""
    asked, epochs = values.get("train", {}).get("warmup_epochs", 0), config.train.epochs
    if asked <= epochs:
        return []
    key = ("train", "warmup_epochs")
    label = labels.get(key, "train.warmup_epochs")
    return [f"{origins[key]}: {label}={asked:g} is longer than the run and is cut to {epochs}, the number of epochs"]


def parse_config(text: str, source: str) -> Config:
    """Parse a config written by `to_yaml`, as stored in checkpoints.

    Raises:
        UserError: The text is not a valid config. The message names `source` as its origin.
    """
    document = yaml.parse(text, source)
    return _validate(document.value, document.origins, {}, source)


def to_yaml(config: Config) -> str:
    """Return the whole config as YAML that loads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"))


def _read_file(path: Path, including: tuple[Path, ...], opened: list[Path]) -> _Layer:
    """Read a config file and its bases.

    Args:
        path: The file.
        including: Files that include this one, directly or through other bases, outermost first.
        opened: All files read so far, extended in place. The first is the one that the user named.

    Raises:
        UserError: A file cannot be read or is invalid, or a base is not allowed.
    """
    place = f"{including[-1]}: base {path}" if including else str(path)
    if path.resolve() in [file.resolve() for file in including]:
        raise one_line_error(
            f"{place} is a cycle ({' -> '.join(map(str, (*including, path)))}); remove one of these bases"
        )
    if len(opened) >= MAX_FILES:
        raise one_line_error(
            f"{place} is one file too many: a config may have up to {MAX_FILES - 1} bases, including bases of bases"
        )
    if including:
        _check_base(path, place, opened[0])
    opened.append(path)
    try:
        with path.open("rb") as file:  # bounded, since a device or pipe may never end
            content = file.read(4 * yaml.MAX_CHARACTERS + 4)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise one_line_error(f"{place} cannot be read ({error.strerror}); give the path of a YAML file") from None
    except ValueError as error:
        raise one_line_error(f"{place} is not a UTF-8 text file ({error})") from None
    document = yaml.parse(text, str(path))
    own = {} if document.value is None else document.value
    if not isinstance(own, dict):
        raise one_line_error(
            f"{path} contains {format_value(own)}, but a config is a mapping such as `train: {{epochs: 5}}`"
        )
    bases = [
        _read_file(path.parent / path_argument(base), (*including, path), opened)
        for base in _pop_bases(own, document.origins)
    ]
    return reduce(_overlay, [*bases, _layer(own, document.origins, document.warnings, is_file=True)])


def _pop_bases(values: dict[str, object], origins: Mapping[KeyPath, str]) -> list[str]:
    """Remove the keys `base` and `BASE` from a file's values, and return the file names they contain.

    Raises:
        UserError: A value is not a file name or a list of file names.
    """
    bases = []
    for key in ("BASE", "base"):
        names = values.pop(key, None)
        names = [names] if isinstance(names, str) else [] if names is None else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise one_line_error(
                f"{origins[key,]}: {key}={format_value(names)} must be a file name or a list of file names"
            )
        bases += [name for name in names if name or key == "base"]  # the homework's default is one empty name
    return bases


def _check_base(path: Path, place: str, first: Path) -> None:
    """Check that a base has a YAML suffix, is in an allowed folder and, if it exists, is a regular file.

    The working folder and the folders of the user's config and of this module are allowed with their subfolders. The
    folders above the user's config are allowed without subfolders. Other folders are not allowed, since a config may
    come from an untrusted source, and error messages quote the content of its bases.

    Raises:
        UserError: The base is not allowed.
    """
    beside = first.resolve().parent
    allowed = list(dict.fromkeys([beside, Path.cwd(), Path(__file__).parent]))
    if path.suffix not in SUFFIXES:
        raise one_line_error(f"{place} is not named like a config; a base must end in {' or '.join(SUFFIXES)}")
    target = path.resolve()
    if target.parent not in beside.parents and not any(target.is_relative_to(folder) for folder in allowed):
        raise one_line_error(
            f"{place} is outside {' and '.join(map(str, allowed))}; a base must be in one of these folders or directly "
            "in a folder above the config, so copy the file there, or start in a folder that contains both"
        )
    if path.exists() and not path.is_file():
        raise one_line_error(f"{place} is not a plain file; give the path of a YAML file")


def split_overrides(items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of the value of each override. `items` are those after `--opts`, see `load_config`.

    Raises:
        UserError: An item has no key or no value, or its key has too many dots.
    """
    remaining = iter(items)
    for item in remaining:
        key, *value = item.split("=", 1)
        text = value[0] if value else next(remaining, None)
        if key.count(".") > MAX_KEY_DEPTH:
            raise one_line_error(
                f"--opts: the key {format_value(key)} has more than {MAX_KEY_DEPTH} dots; settings are not so deep"
            )
        if not key or text is None:
            raise one_line_error(f"--opts: {item!r} lacks a {'value' if key else 'key'}; write KEY=VALUE or KEY VALUE")
        yield key, text


def _layer(
    values: dict[str, object], origin: str | dict[KeyPath, str], warnings: Sequence[str] = (), is_file: bool = False
) -> _Layer:
    """Return a layer with these values. Uppercase top-level keys are homework keys.

    Args:
        values: Nested values.
        origin: Origin of all keys, or a mapping from each key to its origin.
        warnings: Warnings to add to the layer.
        is_file: Whether the values are from a file. Only homework keys in a file enable the homework's defaults.

    Raises:
        UserError: A homework key is unknown, or a homework section is given as a single value.
    """
    settings = {key: value for key, value in values.items() if not key.isupper()}
    origins = dict.fromkeys(_key_paths(values), origin) if isinstance(origin, str) else origin
    homework = flatten_keys({key: value for key, value in values.items() if key.isupper()}, origins)
    return _Layer(settings, origins, homework, is_file and len(settings) < len(values), [*warnings])


def _overlay(old: _Layer, new: _Layer) -> _Layer:
    """Merge `new` over `old`. A homework key in `new` also replaces the setting in `old` that the key translates to."""
    settings, origins = old.settings, old.origins
    for target in {tuple(KEYS[key].target.split(".")) for key in new.homework_values}:
        settings = _remove(settings, target)
        origins = {key: origin for key, origin in origins.items() if key[: len(target)] != target}
    return _Layer(
        _merge(settings, new.settings),
        {**origins, **new.origins},
        {**old.homework_values, **new.homework_values},
        old.is_homework or new.is_homework,
        old.warnings + new.warnings,
    )


def _remove(values: dict[str, object], key_path: KeyPath) -> dict[str, object]:
    """Return nested values without the key `key_path`."""
    first, *rest = key_path
    if not rest:
        return {key: value for key, value in values.items() if key != first}
    section = values.get(first)
    return {**values, first: _remove(section, tuple(rest))} if isinstance(section, dict) else values


def _nested(dotted_key: str, value: object) -> dict[str, object]:
    """Return nested mappings for a dotted key, e.g. {a: {b: value}} for a.b."""
    *sections, last = dotted_key.split(".")
    nested = {last: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def _merge(old: Mapping[str, object], new: Mapping[str, object], path: KeyPath = ()) -> dict[str, object]:
    """Merge `new` over `old`. Mappings are merged key by key, and any other value is replaced."""
    merged = dict(old)
    for key, value in new.items():
        before, key_path = merged.get(key), (*path, key)
        if key_path in SHORTHANDS:
            before = SHORTHANDS[key_path](before)  # so that, for example, a hue can be added to a single number
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merge(before, value, key_path)
        merged[key] = value
    return merged


def _key_paths(values: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key of nested values. The path of a section precedes the paths of its keys."""
    if path:
        yield path
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _key_paths(value, (*path, key))


def _validate(values: object, origins: Mapping[KeyPath, str], labels: Mapping[KeyPath, str], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise one_line_error(describe_error(error, origins, labels, source)) from None
