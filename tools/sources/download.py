"""Download an official archive to a temporary file, verify its md5 and rename the file."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path
from typing import BinaryIO

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from configs.utils.files import atomic_write

SITE = "https://www.cs.toronto.edu/~kriz/"
CHUNK_BYTES = 1 << 20


def download(archive: str, md5: str, folder: Path) -> Path:
    """Download `archive` into `folder`, unless it is already there with the given md5, and return its path.

    Raises:
        UserError: The download fails, or the archive has a different md5.
    """
    path = folder / archive
    if path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5:
        return path
    url = SITE + archive
    help_text = f"fetch it by other means and pass it as --source {path}"

    def fetch(file: BinaryIO) -> None:
        found = _fetch(url, file)
        if found != md5:
            raise UserError(f"{url} arrived with md5 {found}, but the official one is {md5}; try again, or {help_text}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, fetch)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url} to {folder} ({error}); check the network, or {help_text}") from None
    return path


def _fetch(url: str, file: BinaryIO) -> str:
    """Download a URL to an open file, and return the md5 of its content."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=60) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with progress_bar(total=total, unit="B", unit_scale=True, desc=url.removeprefix(SITE)) as progress:
            while content := response.read(CHUNK_BYTES):
                file.write(content)
                digest.update(content)
                progress.update(len(content))
    return digest.hexdigest()
