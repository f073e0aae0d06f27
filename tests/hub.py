"""A stand-in for the Hugging Face Hub: a server with what huggingface_hub writes and reads by."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories, each a list of commits from files' paths to their bytes. Weights go by LFS, as on the real one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        """What was uploaded by LFS, by its SHA-256 sum."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, files: dict[str, bytes]) -> None:
        self.repositories.setdefault(name, [{}]).append(files)


def sha_of(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".mp4"))


class _Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size + 2)[:size]
        self.rfile.readline()
        return data

    def do_PUT(self) -> None:
        data = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self.answer()

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.server.repositories:
                return self.answer({"url": f"{self.server.url}/{name}"}, 409)
            self.server.commit(name, {})
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self.answer({"url": f"{self.server.url}/{name}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in wanted]
            return self.answer({"transfer": "basic", "objects": actions})
        _, _, _, user, repository, verb, _ = path.split("/")
        name = f"{user}/{repository}"
        if verb == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": f, "uploadMode": "lfs" if is_large(f) else "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer({"files": modes})
        assert verb == "commit"
        held = dict(self.server.repositories[name][-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del held[value["path"]]
        self.server.commit(name, held)
        sha = sha_of(name, len(self.server.repositories[name]) - 1)
        return self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[0] == "api"
        if len(parts) < 4:  # what else the client asks for, it does without
            return self.answer(status=404)
        user, repository, verb, revision, *path = [*parts[2:], "revision", "main"] if api else parts
        name = f"{user}/{repository}"
        if name not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        commits = {sha_of(name, i): files for i, files in enumerate(self.server.repositories[name])}
        sha = list(commits)[-1] if revision == "main" else revision
        if sha not in commits:
            return self.refuse(404, "RevisionNotFound")
        if verb == "revision":
            return self.answer({"id": name, "sha": sha, "siblings": []})
        if verb == "tree":
            return self.answer([_entry(file, data) for file, data in commits[sha].items()])
        assert verb == "resolve"
        data = commits[sha].get("/".join(path))
        if data is None:
            return self.refuse(404, "EntryNotFound")
        return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)

    do_HEAD = do_GET


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    oid = hashlib.sha256(data).hexdigest()
    return {**entry, "lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if is_large(path) else entry
