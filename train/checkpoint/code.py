"""Record the user's own code in checkpoints, and find it again from another working directory.

A checkpoint holds the names as given in the config, and the absolute path and sha256 of each file, but not the code.
"""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config, all_settings, settings_by_key
from configs.schema.section import IsCode
from configs.utils.code import file_digest, is_reference, source_file
from configs.utils.warnings import warn
from train.checkpoint.state import Checkpoint, CodeEntry


def code_entries(config: Config) -> dict[str, CodeEntry]:
    """Return the "code" entry of a checkpoint: where the code of each setting that names some was found."""
    files = {key: source_file(reference) for key, reference in _references(config).items()}
    return {key: {"file": str(file), "sha256": file_digest(file)} for key, file in files.items() if file is not None}


def find_code(config: Config, checkpoint: Checkpoint, path: Path) -> Config:
    """Return the config with the recorded absolute path for each file that is not at its path as given.

    Warn if the content of a file has changed.

    Args:
        config: Config of the checkpoint.
        checkpoint: Contents of the checkpoint.
        path: Path of the checkpoint, for warnings.
    """
    entries = checkpoint.get("code", {})
    for key, reference in _references(config).items():
        recorded = entries.get(key)
        if recorded is None:
            continue
        target, _, name = reference.rpartition(":")
        file = source_file(reference)
        if file is None and target.endswith(".py"):
            file = Path(recorded["file"])
            config = _replace(config, key, f"{file}:{name}")
        if file is not None and file.is_file() and file_digest(file) != recorded["sha256"]:
            warn(f"{file} ({key}={reference}) has changed since {path} was written; results may differ")
    return config


def _references(config: Config) -> dict[str, str]:
    """Return the settings that name the user's code, by dotted key."""
    values = settings_by_key(config)
    names = {key: values[key] for key, field in all_settings() if IsCode in field.metadata}
    return {key: name for key, name in names.items() if isinstance(name, str) and is_reference(name)}


def _replace(config: Config, key: str, value: str) -> Config:
    """Return the config with another value of a setting."""
    *sections, last = key.split(".")
    parents = [config]
    for section in sections:
        parents.append(getattr(parents[-1], section))
    changed: object = value
    for parent, name in zip(reversed(parents), reversed([*sections, last]), strict=True):
        changed = parent.model_copy(update={name: changed})
    assert isinstance(changed, Config)
    return changed
