"""A hub on this machine that speaks the protocol of huggingface.co, for the library that talks to it."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
API = "/api/models/me/tiny"


class Hub(BaseHTTPRequestHandler):
    """One model with one commit, and a place for what is uploaded."""

    folder: Path  # of the model
    asked: list[str]  # files that were fetched
    created: dict  # the repository that was made
    uploaded: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        said = self.rfile.read(int(self.headers["Content-Length"]))
        place = f"http://{self.headers['Host']}/me/new"
        if self.path == "/api/repos/create":
            Hub.created = json.loads(said)
            self.send({"url": place, "name": "me/new", "id": "me/new"})
        elif self.path.startswith("/api/models/me/new/preupload/"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.send({"files": [{**file, **how} for file in json.loads(said)["files"]]})
        elif self.path.startswith("/api/models/me/new/commit/"):
            for line in map(json.loads, said.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.send({"success": True, "commitOid": COMMIT, "commitUrl": f"{place}/commit/{COMMIT}"})
        else:
            self.send({"error": self.path}, 404)

    def send(self, answer: dict, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.folder.iterdir())
        body, headers = b"", {}
        if path in {API, f"{API}/revision/main", f"{API}/revision/{COMMIT}"}:
            files = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": files, "tags": []}).encode()
        elif path == f"{API}/tree/{COMMIT}":
            sizes = {file.name: file.stat().st_size for file in self.folder.iterdir()}
            tree = [{"type": "file", "oid": "0" * 40, "size": sizes[name], "path": name} for name in names]
            body = json.dumps(tree).encode()
        elif path.startswith("/me/tiny/resolve/") and path.split("/")[-1] in names:
            body = (self.folder / path.split("/")[-1]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if with_body:
                self.asked.append(path.split("/")[-1])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[dict[str, str]]:
    """The environment of a process that asks this hub."""
    Hub.asked, Hub.created, Hub.uploaded = [], {}, {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        yield {**os.environ, "HF_ENDPOINT": place, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        server.shutdown()
