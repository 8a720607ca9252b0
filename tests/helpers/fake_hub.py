"""A Hugging Face hub on this machine, of which tests see every request."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest


@dataclass
class Repository:
    """
    A repository at one commit. `files` holds its files' content, or the size of a file that cannot be downloaded.
    `status` is the HTTP status of all downloads, such as 403 of a gated repository.
    """

    name: str
    commit: str
    files: dict[str, bytes | int]
    status: int = 200
    downloaded: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        return {path: content if isinstance(content, int) else len(content) for path, content in self.files.items()}

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path, size in self.sizes.items()
        ]


def _handler(repository: Repository) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            revisions = [repository.commit, "main"]
            info = {
                "id": repository.name,
                "sha": repository.commit,
                "siblings": [{"rfilename": path} for path in repository.files],
            }
            if path in [f"/api/models/{repository.name}/revision/{revision}" for revision in revisions]:
                return self.answer_json(info)
            if path in [f"/api/models/{repository.name}/tree/{revision}" for revision in revisions]:
                return self.answer_json(repository.tree())
            if path.startswith(f"/api/models/{repository.name}/revision/"):
                return self.answer(
                    404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}
                )
            if path.startswith("/api/"):
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
            name = path.removeprefix(f"/{repository.name}/resolve/").partition("/")[2]
            content = repository.files.get(name)
            if repository.status != 200:
                gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask the authors for access"}
                return self.answer(repository.status, b"", gated)
            if not isinstance(content, bytes):
                repository.downloaded.append(name)  # asked for, although nothing needs it
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                repository.downloaded.append(name)
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit})

    return Handler


@contextmanager
def serving(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make huggingface_hub ask a server on this machine; give its address, for other processes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repository))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        try:
            yield endpoint
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
