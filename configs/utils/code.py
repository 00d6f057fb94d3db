"""Load functions and classes that settings name as path/to/file.py:NAME or package.module:NAME.

Loading runs the code of the file. A path is relative to the working directory. The folder of a file, or the working
directory for a module, is appended to `sys.path`, so that the code can import its neighbors.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

from configs.utils.errors import UserError

FORMS = "path/to/file.py:NAME or package.module:NAME"
LIBRARIES = ("site-packages", "importlib")  # parts of file names that are not of the user's code


def is_reference(text: str) -> bool:
    """Return True if a setting names a function or class, rather than something built in."""
    target, _, name = text.rpartition(":")
    return name.isidentifier() and (target.endswith(".py") or all(part.isidentifier() for part in target.split(".")))


def load_object(reference: str, setting: str) -> Callable[..., object]:
    """Import and return the function or class that a setting names.

    A file is executed once per process, and again only after its content has changed.

    Args:
        reference: The value of the setting, see `is_reference`.
        setting: Key of the setting, for error messages.

    Raises:
        UserError: The file, module or name does not exist, the object is not callable, or the import fails.
    """
    target, _, name = reference.rpartition(":")
    try:
        module = _import_file(Path(target)) if target.endswith(".py") else _import_module(target)
    except OSError as error:
        raise UserError(
            f"{setting}={reference}: cannot read {target} ({error.strerror}); give {FORMS}, with a path relative to "
            f"the working directory {Path.cwd()}"
        ) from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"{setting}={reference}: {describe_error(error)}; install the module, or start in the folder that has it"
        ) from None
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{setting}={reference}: importing {target} failed: {describe_error(error)}") from error
    found = getattr(module, name, None)
    if _belongs_to_library(found, target):
        raise UserError(f"{setting}={reference}: {name} belongs to Python or to an installed file; name own code")
    if callable(found):
        return found  # type: ignore[no-any-return]
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    what = "has nothing named" if found is None else "cannot call"
    raise UserError(f"{setting}={reference}: {target} {what} {name}; {guess}it defines {', '.join(own) or 'nothing'}")


def _belongs_to_library(found: object, target: str) -> bool:
    """Return True for code that an untrusted checkpoint could misuse, such as torch.hub.load, which runs downloads.

    Installed packages are allowed as modules, but not as files, since a file has another module name when executed.
    """
    if target.endswith(".py"):
        return "site-packages" in Path(target).resolve().parts
    origin = found.__module__ or "" if isinstance(found, (type, FunctionType, BuiltinFunctionType)) else ""
    return origin == "torch.hub" or origin.partition(".")[0] in sys.stdlib_module_names


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    content = path.read_bytes()
    # The name differs from that of any other file, and of other versions of this file.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode() + content).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _append_to_path(path.parent)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before the execution, since dataclasses look their module up
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    _append_to_path(Path.cwd())
    return importlib.import_module(name)


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that no file hides an installed package


def source_file(reference: str) -> Path | None:
    """Return the absolute path of the file that a reference names, or None if there is no such file.

    For a module, its parent packages are imported; if that fails, the result is None.
    """
    target = reference.rpartition(":")[0]
    if target.endswith(".py"):
        return Path(target).resolve() if Path(target).is_file() else None
    try:
        _append_to_path(Path.cwd())
        spec = importlib.util.find_spec(target)
    except Exception:  # the user's code may raise anything
        return None
    return None if spec is None or spec.origin is None or not Path(spec.origin).is_file() else Path(spec.origin)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content as hexadecimal digits, or an empty text if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def describe_error(error: Exception) -> str:
    """Describe an error in the user's code in one line: its type, its message and the line that raised it."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    # After the caller's own frames come those of the user's code, and then perhaps those of a library.
    theirs = [frame for frame in frames if not any(part in frame.filename for part in LIBRARIES)]
    is_caller = not theirs or theirs[-1].filename == frames[0].filename
    place = "" if is_caller else f" ({theirs[-1].filename}, line {theirs[-1].lineno})"
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    return f"{type(error).__name__}: {text}{place}"
