"""A W&B server for tests that takes what runs upload: the other half of ``wandb_server``, which lets them be read.

It answers the requests that wandb's client (0.31) makes for a run, in the form of its generated GraphQL operations.
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Uploads:
    """What the server got. ``artifacts``: False: artifact files are never taken, the client tries again."""

    def __init__(self, artifacts: bool = True) -> None:
        self.url = ""
        self.artifacts = artifacts
        self.operations: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}  # by id: the variables of its last UpsertBucket
        self.streams: dict[str, list[dict[str, Any]]] = {}  # by id: the bodies of its file_stream requests
        self.created: list[dict[str, Any]] = []  # artifacts

    def history(self, run: str) -> list[dict[str, Any]]:
        """The lines of the run's history file: each request writes its lines over what there is from its offset on."""
        lines: list[str] = []
        for body in self.streams.get(run, []):
            part = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
        return [json.loads(line) for line in lines]

    def exit_codes(self, run: str) -> list[int]:
        return [body["exitcode"] for body in self.streams[run] if body.get("exitcode") is not None]

    def answer(self, operation: str, given: dict[str, Any]) -> Any:
        self.operations.append(operation)
        project = {"id": "UA==", "name": "ohgw", "entity": {"id": "RQ==", "name": "team"}}
        manifest = {"artifactManifest": {"id": "TQ==", "file": self._file("manifest")}}
        if operation == "UpsertBucket":
            self.runs.setdefault(given["name"], {}).update({k: v for k, v in given.items() if v is not None})
            bucket = {"id": "Qg==", "name": given["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in given["files"]]
            return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.created.append(given["input"])
            artifact = {"id": "QQ==", "state": "PENDING", "artifactSequence": {"id": "Uw==", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactFiles":
            nodes = [{"node": self._file(spec["name"])} for spec in given["input"]["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": nodes}}}
        return {
            "RunResumeStatus": {"model": project | {"bucket": self._known(given.get("name", ""))}},
            "Viewer": {"viewer": {"id": "VQ==", "entity": "team", "username": "u", "flags": "{}"}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "ArtifactType": {"project": {"artifact": None}},
            "CreateArtifactManifest": {"createArtifactManifest": manifest},
            "UpdateArtifactManifest": {"updateArtifactManifest": manifest},
            "CommitArtifact": {"commitArtifact": {"artifact": {"id": "QQ==", "digest": "d"}}},
        }.get(operation, {})

    def _known(self, run: str) -> Any:
        """A run to resume; None if there is none."""
        if run not in self.runs:
            return None
        history = self.history(run)
        return {"id": "Qg==", "name": run, "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]), "eventsTail": "[]",
                "summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}  # fmt: skip

    def _file(self, name: str) -> dict[str, Any]:
        return {"id": "Rg==", "name": name, "displayName": name, "storagePath": name, "uploadUrl": f"{self.url}/put",
                "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": "QQ=="}}  # fmt: skip


@contextmanager
def taking(uploads: Uploads) -> Iterator[Uploads]:
    """Runs the server; ``uploads.url`` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            if self.path.endswith("/graphql"):
                request = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]  # type: ignore[index]
                if operation == "CreateArtifactFiles" and not uploads.artifacts:
                    return self._send({}, 503)
                return self._send({"data": uploads.answer(operation, request.get("variables") or {})})
            *_, run, kind = self.path.split("/")
            if kind == "file_stream":
                uploads.streams.setdefault(run, []).append(json.loads(body))
            self._send({})

        def do_PUT(self) -> None:
            self._body()
            self._send({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _send(self, answer: Any, status: int = 200) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the client closes connections when it ends

    server = Server(("127.0.0.1", 0), Handler)
    uploads.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield uploads
    finally:
        server.shutdown()
        server.server_close()
