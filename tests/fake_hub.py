"""A hub on this machine: model repositories out of folders, over HTTP, with every byte counted."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSAL, GONE = "refusal.txt", "RepoNotFound"
"""A repository with this file answers everything with its status and code; one that is not there
with the second."""


class FakeHub:
    """What runs.

    Attributes:
        url: for `HF_ENDPOINT`.
        sent: `org/name/file` -> bytes of it that were sent.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.sent: Counter[str] = Counter()

    def files_of(self, repository: str) -> dict[str, int]:
        """What was sent of a repository: file to bytes."""
        prefix = f"{repository}/"
        return {
            name.removeprefix(prefix): count
            for name, count in self.sent.items()
            if name.startswith(prefix)
        }


@contextmanager
def serve(root: Path) -> Iterator[FakeHub]:
    """Serve `root/org/name` as the repository `org/name`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing is printed."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            of_api = parts[:2] == ["api", "models"]
            repository = root.joinpath(*(parts[2:4] if of_api else parts[:2]))
            refused = repository / REFUSAL
            if not repository.is_dir() or refused.is_file():
                status, code = refused.read_text().split() if refused.is_file() else ("404", GONE)
                self.send(b"refused", body, {"X-Error-Code": code}, int(status))
                return
            if of_api:
                folder = repository
                document: Any = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}
                if parts[4] == "tree":
                    document = [entry(folder, path) for path in files(folder)]
                self.send(json.dumps(document).encode(), body, {})
                return
            org, name, _resolve, _revision, *rest = parts
            path = root.joinpath(org, name, *rest)
            if not path.is_file():
                self.send(b"Entry not found", body, {"X-Error-Code": "EntryNotFound"}, 404)
                return
            content = path.read_bytes()
            if body:
                hub.sent["/".join([org, name, *rest])] += len(content)
            self.send(content, body, {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})

        def send(
            self, content: bytes, body: bool, headers: dict[str, str], status: int = 200
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    return {
        "type": "file",
        "path": str(path.relative_to(folder)),
        "size": path.stat().st_size,
        "oid": digest(path),
    }
