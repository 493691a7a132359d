"""A web server on this machine, for tests of downloads."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(pages: dict[str, bytes], stop_after: int | None = None, resumable: bool = True, stops: int = 10**6):
    """Serve ``pages`` (path to content); gives the address and a list of the paths that were asked for.

    With ``stop_after``, the first ``stops`` answers break off after so many bytes. A ``resumable`` server has an ETag
    and answers a Range of the same version; a part that is asked for is in the list as ``path@first``.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = pages.get(self.path)
            tag = f'"{hashlib.sha256(content or b"").hexdigest()}"'
            first = 0
            if resumable and "Range" in self.headers and self.headers.get("If-Range", tag) == tag:
                first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            asked.append(f"{self.path}@{first}" if first else self.path)
            if content is not None and first >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(404 if content is None else 206 if first else 200)
            rest = (content or b"")[first:]
            self.send_header("Content-Length", str(len(rest)))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            if resumable:
                self.send_header("ETag", tag)
            self.end_headers()
            if stop_after is not None and len(asked) <= stops:
                rest = rest[:stop_after]
                self.close_connection = True
            self.wfile.write(rest)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
