"""A stand-in for the Hugging Face Hub: repositories in memory, with the HTTP interface that huggingface_hub uses to
create one, to commit small files, and to download them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """Content of a Hub that one token may write to."""

    token: str
    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Repository → whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository → content of its newest commit."""

    def commit_id(self, repository: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repository].items())).encode()).hexdigest()


@contextmanager
def hub_server(token: str) -> Iterator[Hub]:
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, values: object = None, body: bytes = b"", **headers: str) -> None:
            body = json.dumps(values).encode() if values is not None else body
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != f"Bearer {hub.token}":
                self.answer(401, {"error": "Invalid credentials"})
            elif self.path == "/api/repos/create":
                values = json.loads(content)
                name = f"{values['organization']}/{values['name']}"
                if name in hub.files:
                    self.answer(409, {"url": f"{hub.url}/{name}"})
                    return
                hub.private[name], hub.files[name] = values.get("visibility") == "private", {}
                self.answer(200, {"url": f"{hub.url}/{name}"})
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.path.partition("?")[0].endswith("/preupload/main"):
                files = [file["path"] for file in json.loads(content)["files"]]
                self.answer(
                    200,
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]},
                )
            elif name := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path.partition("?")[0]):
                for line in map(json.loads, content.splitlines()):
                    if line["key"] == "file":
                        hub.files[name[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = hub.commit_id(name[1])
                self.answer(
                    200, {"commitUrl": f"{hub.url}/{name[1]}/commit/{commit}", "commitOid": commit, "success": True}
                )
            else:
                self.answer(404)

        def do_HEAD(self) -> None:
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if match is None or match[1] not in hub.files:
                self.answer(404, X_Error_Code="RepoNotFound")
                return
            content, commit = hub.files[match[1]].get(match[3]), hub.commit_id(match[1])
            if content is None:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                return
            etag = hashlib.sha1(content).hexdigest()
            self.answer(200, body=content, ETag=f'"{etag}"', X_Repo_Commit=commit)

        do_GET = do_HEAD

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
