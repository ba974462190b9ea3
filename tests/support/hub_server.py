"""A look-alike of the Hugging Face Hub on the loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading

REPO = "someone/tiny"
SHA, OLD = "a" * 40, "b" * 40


class Hub(http.server.ThreadingHTTPServer):
    """repos: the files of each repository, name → content; `files` are those of the first one. The rest says
    how it misbehaves.
    """

    daemon_threads = True

    def __init__(
        self, files: dict[str, bytes] | None = None, repos: dict[str, dict[str, bytes]] | None = None
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos or {REPO: files or {}}
        self.promised: dict[str, dict] = {}  # what the metadata says instead of the truth
        self.fail: tuple[int, dict[str, str]] | None = None
        self.cuts = 0  # downloads that end in the middle
        self.pause = 0.0
        self.card: dict[str, object] = {}  # what README.md says above its text
        self.gated: str | bool = False
        self.seen: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        return next(iter(self.repos.values()))

    @files.setter
    def files(self, files: dict[str, bytes]) -> None:
        self.repos[next(iter(self.repos))] = files


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.seen.append((self.command, path, self.headers.get("Range")))
        if hub.fail:
            status, headers = hub.fail
            return self.send(status, b'{"error": "no"}', headers, body)
        for repo, files in hub.repos.items():
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/{SHA}"):
                return self.send(200, self.metadata(repo, SHA), {}, body)
            if path in (f"/api/models/{repo}/revision/v1", f"/api/models/{repo}/revision/{OLD}"):
                return self.send(200, self.metadata(repo, OLD), {}, body)
            if path in (f"/api/models/{repo}/tree/{SHA}", f"/api/models/{repo}/tree/{OLD}"):
                return self.send(200, self.tree(files), {}, body)
            for revision in (SHA, OLD):
                prefix = f"/{repo}/resolve/{revision}/"
                if path.startswith(prefix) and (name := path.removeprefix(prefix)) in files:
                    return self.file(files[name], revision, body)
        if "/revision/" in path:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def metadata(self, repo: str, sha: str) -> bytes:
        siblings = []
        for name, content in self.server.repos[repo].items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if name.endswith((".safetensors", ".gguf")):
                entry["lfs"] = lfs | self.server.promised.get(name, {})
                entry["size"] = entry["lfs"]["size"]
            siblings.append(entry)
        said = {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings}
        return json.dumps(said | {"cardData": self.server.card, "gated": self.server.gated}).encode()

    def tree(self, files: dict[str, bytes]) -> bytes:
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": len(content)}
            entries.append(entry | {"oid": hashlib.sha1(content).hexdigest()})
        return json.dumps(entries).encode()

    def file(self, content: bytes, revision: str, body: bool) -> None:
        hub = self.server
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        part = content[start:]
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if body and hub.cuts and len(part) > 50_000:
            hub.cuts -= 1
            self.send(206 if asked else 200, part, headers, body, cut=len(part) // 2)
            self.close_connection = True
            return
        self.send(206 if asked else 200, part, headers, body)

    def send(self, status: int, content: bytes, headers: dict, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        for at in range(0, len(content[:cut]), 65536):
            self.wfile.write(content[:cut][at : at + 65536])
            if self.server.pause:
                threading.Event().wait(self.server.pause)
        self.wfile.flush()
