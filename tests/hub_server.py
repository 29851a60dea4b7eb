"""A hub on this machine: the part of its HTTP interface that pushing and opening models needs.

`huggingface_hub` talks to it through `HF_ENDPOINT`, so uploads, commits and downloads are its own. Every push is a commit
of the branch `main`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Repository:
    """Files of the branch `main` by name, and the id of the last commit."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commit = "0" * 40
        self.messages: list[str] = []


class Hub:
    """Repositories by id, and what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The class that answers for a hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, code: str, said: str) -> None:
            self.answer(404, {"error": said}, X_Error_Code=code, X_Error_Message=said)

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def respond(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            hub.requests.append(f"{self.command} {path}")
            for pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found:
                    return answer(self, body, *found.groups())
            self.missing("EntryNotFound", f"{self.command} {path}")

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def repository(self, name: str) -> Repository | None:
            if name not in hub.repositories:
                self.missing("RepoNotFound", f"no repository {name}")
            return hub.repositories.get(name)

        def create(self, body: bytes) -> None:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'us'}/{asked['name']}"
            hub.repositories.setdefault(name, Repository())
            self.answer(200, {"url": f"{hub.url}/{name}", "id": name, "name": name})

        def preupload(self, body: bytes, name: str) -> None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files, "commitOid": hub.repositories[name].commit})

        def batch(self, body: bytes, name: str) -> None:
            objects = json.loads(body)["objects"]
            upload = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}", "header": {}}}}
                for one in objects
            ]
            self.answer(200, {"transfer": "basic", "objects": upload})

        def upload(self, body: bytes, oid: str) -> None:
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            self.answer(200)

        def make_commit(self, body: bytes, name: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            for line in filter(None, body.splitlines()):
                part = json.loads(line)
                value = part["value"]
                if part["key"] == "header":
                    repository.messages.append(value["summary"])
                elif part["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif part["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.large[value["oid"]]
                elif part["key"] == "deletedFile":
                    repository.files.pop(value["path"], None)
            repository.commit = hashlib.sha1(body + repository.commit.encode()).hexdigest()
            url = f"{hub.url}/{name}/commit/{repository.commit}"
            self.answer(200, {"commitUrl": url, "commitOid": repository.commit, "success": True})

        def info(self, _: bytes, name: str) -> None:
            repository = self.repository(name)
            if repository is not None:
                siblings = [{"rfilename": file} for file in repository.files]
                found = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []}
                self.answer(200, {**found, "private": False, "downloads": 0, "likes": 0})

        def tree(self, _: bytes, name: str, folder: str | None) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            inside = [file for file in repository.files if file.startswith(f"{folder}/" if folder else "")]
            if folder and not inside:
                return self.missing("EntryNotFound", f"no folder {folder}")
            self.answer(
                200,
                [
                    {"type": "file", "path": f, "size": len(repository.files[f]), "oid": oid(repository.files[f])}
                    for f in inside
                ],
            )

        def resolve(self, _: bytes, name: str, file: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            if file not in repository.files:
                return self.answer(
                    404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.commit
                )
            content = repository.files[file]
            self.answer(200, content, ETag=f'"{oid(content)}"', X_Repo_Commit=repository.commit, Accept_Ranges="none")

    name = r"([^/]+/[^/]+)"
    ROUTES = [
        (r"/api/repos/create", Handler.create),
        (r"/api/validate-yaml", lambda self, _: self.answer(200, {"errors": [], "warnings": []})),
        (r"/api/whoami-v2", lambda self, _: self.answer(200, {"name": "us", "type": "user", "orgs": []})),
        (rf"/api/models/{name}/preupload/main", Handler.preupload),
        (rf"/api/models/{name}/commit/main", Handler.make_commit),
        (rf"/api/models/{name}(?:/revision/[^/]+)?", Handler.info),
        (rf"/api/models/{name}/tree/[^/]+(?:/(.*))?", Handler.tree),
        (rf"/{name}\.git/info/lfs/objects/batch", Handler.batch),
        (r"/large/([0-9a-f]{64})", Handler.upload),
        (rf"/{name}/resolve/[^/]+/(.+)", Handler.resolve),
    ]
    return Handler


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `hub.url` inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
