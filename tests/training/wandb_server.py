"""A small W&B server on the loopback: it takes one run's history, remembers it for a resume, and can go away."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Serves while it is entered; `history` holds the lines it was sent, in order."""

    def __init__(self):
        self.history: list[dict[str, Any]] = []
        self._names = {"id": "p", "name": "megahybrid", "entity": {"id": "e", "name": "me"}}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.go_away()

    def go_away(self) -> None:
        """Answer nobody from now on."""
        if self._server.socket.fileno() >= 0:
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
            return {"exitcode": None, "limits": {}}
        query, variables = body.get("query", ""), body.get("variables", {})
        if "upsertBucket" in query:
            bucket = self._bucket(variables.get("name")) | {"project": self._names}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}}
        if "createRunFiles" in query:
            return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}}
        if "bucket(" in query:
            found = self._bucket(variables.get("name")) if self.history else None
            return {"data": {"model": {**self._names, "bucket": found}}}
        return {"data": {}}

    def _bucket(self, name: str | None) -> dict[str, Any]:
        tail = json.dumps([json.dumps(line) for line in self.history[-1:]])
        facts = {"id": "r", "name": name, "displayName": name, "description": "", "config": "{}", "sweepName": None}
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}'}
        return {**facts, **counts, **texts, "tags": []}

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    sent = gzip.decompress(sent)
                try:
                    answer = server._answer(self.path, json.loads(sent))
                except ValueError:  # telemetry, which is not JSON
                    answer = {}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
