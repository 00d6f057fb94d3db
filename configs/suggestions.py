"""Parts of error messages about settings: one-line errors, formatted values and suggestions for unknown keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence

from configs.schema.section import Section
from configs.utils.errors import UserError

KeyPath = tuple[str, ...]


def one_line_error(message: str) -> UserError:
    """Return a UserError whose message is one line, even if quoted values contain line breaks."""
    return UserError(" ".join(message.split()))


def format_value(value: object) -> str:
    """Return a value as one line of JSON (also valid YAML), shortened to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=lambda it: dict(it) if isinstance(it, Section) else str(it))
    return text if len(text) <= 80 else text[:77] + "..."


def suggest_keys(key_path: KeyPath, known: Sequence[str]) -> str:
    """Return suggestions for an unknown key: similar keys in `known`, and all keys of the section."""
    *parents, leaf = key_path
    prefix = "".join(f"{parent}." for parent in parents)
    siblings = {
        key.removeprefix(prefix).lower(): key.removeprefix(prefix)
        for key in known
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    }
    elsewhere = [key for key in known if leaf and key.lower().endswith(f".{leaf.lower()}")]
    close = [prefix + siblings[key] for key in difflib.get_close_matches(leaf.lower(), siblings, n=2)]
    guess = f"did you mean {' or '.join(dict.fromkeys(elsewhere + close))}? " if elsewhere or close else ""
    if ":" in leaf:
        guess = "write a space after a colon; "
    elif "." in leaf:
        guess = "in a file, nest sections instead of writing dots; "
    return f"{guess}allowed in {prefix.rstrip('.') or 'the config'}: {', '.join(siblings.values())}"
