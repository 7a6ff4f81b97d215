"""A hub on this machine, for huggingface_hub itself: as much of the protocol as fetching a repository takes.

Repositories are folders under a root, "ROOT/organisation/name". Those called "gated" are refused to strangers.
"""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serves the repositories under `root`.

    Yields:
        Variables of the environment that bring a new process here, and the paths of the files it has fetched so far.
    """
    fetched: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name = re.match(r"/(?:api/models/)?([^/]+/[^/]+)/", self.path)
            folder = root / name[1] if name else root / "none"
            if not folder.is_dir():
                self.answer(
                    401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                )
            elif folder.name == "gated":
                said = f"Access to model {name[1] if name else ''} is restricted."
                self.answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": said})
            elif "/tree/" in self.path:
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                    for file in sorted(folder.iterdir())
                ]
                self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/api/"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                about = {"id": name and name[1], "sha": COMMIT, "siblings": files}
                self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
            else:
                file = folder / self.path.rpartition("/")[2]
                content = file.read_bytes()
                if self.command == "GET":
                    fetched.append(f"{name and name[1]}/{file.name}")
                self.answer(200, content, {"ETag": f'"{file.name}-{len(content)}"', "X-Repo-Commit": COMMIT})

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(root / "home")}
    try:
        yield variables | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}, fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
