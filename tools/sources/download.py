"""Download an official archive to a temporary file, verify its md5 and rename the file."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from configs.utils.errors import UserError

SITE = "https://www.cs.toronto.edu/~kriz/"
CHUNK_BYTES = 1 << 20


def download(archive: str, md5: str, folder: Path) -> Path:
    """Download `archive` into `folder`, unless it is already there with the given md5, and return its path.

    Raises:
        UserError: The download fails, or the archive has a different md5.
    """
    path = folder / archive
    if path.is_file() and _md5_of(path) == md5:
        return path
    part = folder / f"{archive}.part"
    url = SITE + archive
    help_text = f"fetch it by other means and pass it as --source {path}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, part)
        if found != md5:
            raise UserError(f"{url} arrived with md5 {found}, but the official one is {md5}; try again, or {help_text}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url} to {folder} ({error}); check the network, or {help_text}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _fetch(url: str, part: Path) -> str:
    """Download a URL to the file `part`, and return the md5 of its content."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=part.stem) as progress:
            while content := response.read(CHUNK_BYTES):
                file.write(content)
                digest.update(content)
                progress.update(len(content))
    return digest.hexdigest()


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while content := file.read(CHUNK_BYTES):
            digest.update(content)
    return digest.hexdigest()
