"""`lowtide serve`: an exhibit on a page of this machine, by Python's own HTTP server.

The page is one file. It fetches nothing but what this server draws.
"""

import json
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import cast

import torch

from lowtide.errors import BadInput
from lowtide.report.page import exhibit_page
from lowtide.workflows.exhibit import Exhibit

MOST_BYTES = 100_000  # of a request
LOCAL = ("127.0.0.1", "localhost", "::1")


class ExhibitServer(ThreadingHTTPServer):
    """Serves the page and draws images, one request at a time."""

    daemon_threads = True

    def __init__(self, exhibit: Exhibit, host: str = "127.0.0.1", port: int = 8765):
        self.exhibit = exhibit
        self.page = exhibit_page(exhibit.describe())
        self.turn = Lock()
        try:
            super().__init__((host, port), _Answers)
        except OSError as error:
            raise BadInput(
                f"found {host}:{port} not to be had ({error.strerror})",
                "a free address of this machine",
                "give another with --port or --host",
            ) from None

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def names(self, host: str | None) -> bool:
        """Whether a request meant this server: a page elsewhere cannot send a name of its own."""
        name = (host or "").rpartition(":")[0].strip("[]")
        return self.server_address[0] not in LOCAL or name in LOCAL


class _Answers(BaseHTTPRequestHandler):
    """GET / is the page; POST /draw takes and answers JSON."""

    def do_GET(self) -> None:
        if self.path != "/":
            return self._say(HTTPStatus.NOT_FOUND, "found no such page; expected /; open /")
        if not self._server.names(self.headers["Host"]):
            return self._say(HTTPStatus.FORBIDDEN, "found another host's name; expected localhost")
        return self._send(HTTPStatus.OK, self._server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        own = self._server.names(self.headers["Host"])
        typed = self.headers.get_content_type() == "application/json"
        if self.path != "/draw" or not own or not typed:
            return self._say(HTTPStatus.NOT_FOUND, "found no such address; expected JSON to /draw")
        size = self.headers["Content-Length"] or ""
        if not size.isdigit() or int(size) > MOST_BYTES:
            text = f"found no length or a larger one; expected at most {MOST_BYTES:,} bytes"
            return self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        return self._draw(self.rfile.read(int(size)))

    def _draw(self, body: bytes) -> None:
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise BadInput("found no JSON object", "a prompt, a seed and the like", "send one")
            with self._server.turn, torch.inference_mode():
                answer = self._server.exhibit.draw(asked)
        except (BadInput, json.JSONDecodeError, UnicodeDecodeError) as error:
            return self._say(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:
            traceback.print_exc()
            return self._say(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        return self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    @property
    def _server(self) -> ExhibitServer:
        return cast(ExhibitServer, self.server)

    def _say(self, status: HTTPStatus, error: str) -> None:
        self._send(status, json.dumps({"error": error}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the page says what went wrong."""
