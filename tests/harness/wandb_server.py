"""A small W&B server for tests: one project with what the offline runs in a folder would upload. Read only.

It answers, over HTTP, the requests that wandb's own client (0.31) makes to list a project's runs and their artifacts
and to download files, in the form of wandb's generated GraphQL operations.
"""

import base64
import gzip
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.report.fetch import read_offline_run

ENTITY, PROJECT = "team", "ohgw"
DATE = "2026-01-01T00:00:00Z"


@contextmanager
def serve(offline_files: Iterable[Path]) -> Iterator[tuple[str, list[str]]]:
    """Runs the server; gives its address and the list of the requests so far: names of operations and paths."""
    project, requests = _Project(list(offline_files)), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path != "/graphql":
                return self._send(b"{}")  # the client's own telemetry
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = json.loads(body)
            name = next(word.split("(")[0] for word in request["query"].split("query ", 1)[1].split())
            requests.append(name)
            answer = getattr(project, f"answer_{name}")(request.get("variables") or {}, self._root())
            self._send(json.dumps({"data": answer}).encode())

        def do_GET(self) -> None:
            requests.append(self.path)
            self._send(project.content(self.path))

        def _root(self) -> str:
            return f"http://{self.headers['Host']}"

        def _send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Project:
    def __init__(self, files: list[Path]):
        self.runs: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.by_digest: dict[str, Path] = {}
        for file in files:
            records = list(read_offline_run(file))
            run = next(record.run for record in records if record.HasField("run"))
            self.runs[run.run_id] = run
            logged = [record.artifact for record in records if record.HasField("artifact")]
            self.artifacts |= {_id(f"{run.run_id}:{i}"): artifact for i, artifact in enumerate(logged)}
            for entry in (entry for artifact in logged for entry in artifact.manifest.contents):
                self.by_digest[base64.b64decode(entry.digest).hex()] = Path(entry.local_path)

    def answer_Viewer(self, variables: dict[str, Any], root: str) -> Any:
        return {"viewer": {"id": _id("user"), "username": "u", "entity": ENTITY, "email": "u@example.org",
                           "admin": False, "flags": "{}", "teams": {"edges": []}}}  # fmt: skip

    def answer_GetDefaultEntity(self, variables: dict[str, Any], root: str) -> Any:
        return {"viewer": {"id": _id("user"), "entity": ENTITY}}

    def answer_ServerFeaturesQuery(self, variables: dict[str, Any], root: str) -> Any:
        return {"serverInfo": {"features": []}}

    def answer_Runs(self, variables: dict[str, Any], root: str) -> Any:
        if (variables["entity"], variables["project"]) != (ENTITY, PROJECT):
            return {"project": None}
        nodes = [{"node": _run(run), "cursor": name} for name, run in self.runs.items()]
        page = {"endCursor": None, "hasNextPage": False}
        return {"project": {"internalId": _id("project"), "runCount": len(nodes), "readOnly": False,
                            "runs": {"edges": nodes, "pageInfo": page}}}  # fmt: skip

    def answer_RunOutputArtifacts(self, variables: dict[str, Any], root: str) -> Any:
        logged = {name: one for name, one in self.artifacts.items() if one.run_id == variables["run"]}
        found = {"totalCount": len(logged), "pageInfo": {"endCursor": None, "hasNextPage": False},
                 "edges": [{"node": _artifact(name, one)} for name, one in logged.items()]}  # fmt: skip
        return {"project": {"run": {"artifacts": found}}}

    def answer_FetchArtifactManifest(self, variables: dict[str, Any], root: str) -> Any:
        return {"artifact": {"currentManifest": {"file": {"directUrl": f"{root}/manifest/{variables['id']}"}}}}

    def content(self, path: str) -> bytes:
        first, *_, last = path.strip("/").split("/")
        if first == "manifest":
            manifest = self.artifacts[last].manifest
            contents = {entry.path: {"digest": entry.digest, "size": entry.size} for entry in manifest.contents}
            return json.dumps({"version": 1, "storagePolicy": manifest.storage_policy, "contents": contents,
                               "storagePolicyConfig": {"storageLayout": "V2"}}).encode()  # fmt: skip
        assert first == "artifactsV2"  # .../<digest in hexadecimal digits>/<file name>
        return self.by_digest[path.split("/")[-2]].read_bytes()


def _id(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _run(run: Any) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(["sweepName", "commit", "description", "notes"])
    return {"projectId": 1, "id": _id(run.run_id), "tags": [], "name": run.run_id, "displayName": run.display_name,
            "state": "finished", "group": run.run_group, "jobType": run.job_type, "readOnly": False,
            "createdAt": DATE, "heartbeatAt": DATE, "historyLineCount": 1,
            "user": {"name": "u", "username": "u"}} | empty  # fmt: skip


def _artifact(name: str, artifact: Any) -> dict[str, Any]:
    project = {"id": _id("project"), "internalId": _id("1"), "name": PROJECT, "entity": {"name": ENTITY}}
    sequence = {"__typename": "ArtifactSequence", "name": artifact.name, "project": project}
    return {"__typename": "Artifact", "id": name, "artifactSequence": sequence, "versionIndex": 0,
            "artifactType": {"name": artifact.type}, "description": None, "metadata": artifact.metadata or None,
            "ttlDurationSeconds": -1, "ttlIsInherited": False, "tags": [], "historyStep": None, "state": "COMMITTED",
            "size": 1, "digest": artifact.digest, "commitHash": None, "fileCount": len(artifact.manifest.contents),
            "createdAt": DATE, "updatedAt": None, "aliases": []}  # fmt: skip
