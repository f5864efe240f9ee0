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


class ObjectStore:
    """Serves a folder as s3://bucket/…"""

    def __init__(self, root: Path):
        self.root = root
        self.faults: dict[str, str] = {}
        """File name → missing, cut, flipped, error, broken (a connection that ends early) or silent."""
        self.downloads: Counter[str] = Counter()
        """File name → how often it was asked for."""
        self.url = ""

    def content(self, key: str) -> bytes | None:
        """What a GET of this key gives; None if it gives an error."""
        path = self.root / key
        fault = self.faults.get(path.name)
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
            fault = store.faults.get(Path(key).name)
            if with_body:
                store.downloads[Path(key).name] += 1
            if fault == "silent":
                ended.wait(30)
                return
            data = store.content(key)
            if data is None or fault == "error":
                self.send_response(404 if data is None else 500)
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
