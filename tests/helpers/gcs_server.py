"""A server with the part of Google Cloud Storage's interface that gcsfs needs to list, read and write objects."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from helpers.object_store import BUCKET, Answer, ObjectStore


class Bucket:
    """Answers requests for the objects of one bucket.

    Attributes:
        objects: Contents by name.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}  # of unfinished uploads
        self.url = ""

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        place = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(place.query).items()}
        name = unquote(place.path.partition("/o/")[2])
        if place.path.startswith("/upload/"):
            return self.upload(query, headers, body)
        if not name:
            return self.answer({"items": self.list(query)} if f"/b/{BUCKET}/o" in place.path else {})
        if name not in self.objects:
            return Answer(404, [], b"Not Found")
        if method == "DELETE":
            del self.objects[name]
            return Answer(204, [], b"")
        if query.get("alt") == "media":
            return Answer(200, [], self.objects[name])
        return self.answer(self.describe(name))

    def upload(self, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        if query["uploadType"] == "multipart":
            _, about, content = body.removesuffix(b"\n--==0==--").split(b"\n\n", 2)
            return self.store(json.loads(about.split(b"\n--==0==")[0])["name"], content)
        name = query["name"]
        if "Content-Range" not in headers:
            self.parts[name] = b""
            location = f"{self.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&name={name}&upload_id=1"
            return Answer(200, [("Location", location)], b"")
        self.parts[name] += body
        last, size = headers["Content-Range"].rpartition("-")[2].split("/")
        if int(last) + 1 == int(size):
            return self.store(name, self.parts.pop(name))
        return Answer(308, [("Range", f"bytes=0-{last}")], b"")

    def store(self, name: str, content: bytes) -> Answer:
        self.objects[name] = content
        return self.answer(self.describe(name))

    def list(self, query: dict[str, str]) -> list[dict[str, str]]:
        return [self.describe(name) for name in sorted(self.objects) if name.startswith(query.get("prefix", ""))]

    def describe(self, name: str) -> dict[str, str]:
        digest = hashlib.md5(self.objects[name]).digest()
        entry = {"name": name, "bucket": BUCKET, "size": str(len(self.objects[name])), "etag": "x="}
        return {**entry, "md5Hash": base64.b64encode(digest).decode()}

    @staticmethod
    def answer(content: object) -> Answer:
        return Answer(200, [("Content-Type", "application/json")], json.dumps(content).encode())


@contextmanager
def gcs_server() -> Iterator[tuple[ObjectStore, Bucket]]:
    """Start a server with an empty bucket, and set the variable by which gcsfs finds it."""
    bucket = Bucket()
    server = ObjectStore(bucket.ask)
    bucket.url = server.url
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", server.url)
            yield server, bucket
    finally:
        server.close()
