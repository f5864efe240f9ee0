"""An S3 server for the tests: enough of it for downloads, and the faults that real ones have."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


_STATUS = {"error": 500, "busy": 503}


class ObjectStore:
    """Serves a folder as s3://bucket/…"""

    def __init__(self, root: Path):
        self.root = root
        self.faults: dict[str, str] = {}
        """File name → missing, cut, flipped, error, busy (SlowDown), broken (a connection that ends early), closed
        (one that ends without an answer) or silent."""
        self.times: dict[str, int] = {}
        """File name → how many requests have the fault; all, if it is not here."""
        self.downloads: Counter[str] = Counter()
        """File name → how often it was asked for."""
        self.url = ""

    def next_fault(self, name: str) -> str | None:
        """The fault of a request for a file."""
        if name in self.times and name in self.faults:
            if not self.times[name]:
                return None
            self.times[name] -= 1
        return self.faults.get(name)

    def content(self, key: str, fault: str | None) -> bytes | None:
        """What a GET of this key gives; None if it gives an error."""
        path = self.root / key
        if fault == "missing" or not path.is_file():
            return None
        data = path.read_bytes()
        if fault == "cut":
            return data[: len(data) // 2]
        return data[:-1] + bytes([data[-1] ^ 1]) if fault == "flipped" else data


@contextmanager
def serve(root: Path) -> Iterator[ObjectStore]:
    """Serve `root` until the block ends."""
    store = ObjectStore(root)
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body: bool):
            key = self.path.split("?")[0].removeprefix("/bucket/")
            fault = store.next_fault(Path(key).name)
            if with_body:
                store.downloads[Path(key).name] += 1
            if fault == "silent":
                ended.wait(30)
                return
            if fault == "closed":
                self.close_connection = True
                return
            data = store.content(key, fault)
            if data is None or fault in _STATUS:
                self.send_response(404 if data is None else _STATUS[fault])
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.send_header("Last-Modified", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(0)))
            self.end_headers()
            if with_body:
                self.wfile.write(data[: len(data) // 2] if fault == "broken" else data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
