"""A real chat endpoint for tests: an HTTP server in a thread that answers as a function tells it to.

with ChatServer(lambda request: "the reply") as server:  # or (status, text), or (status, text, headers), or a choice
    judge = pairwise("openai:m", base_url=server.url)
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Request:
    """What reached the server."""

    def __init__(self, body: dict[str, Any], headers: Mapping[str, str], path: str, number: int) -> None:
        self.body, self.headers, self.path, self.number = body, headers, path, number

    @property
    def text(self) -> str:
        return self.body["messages"][-1]["content"]

    @property
    def id(self) -> str:
        """The id that the verdict must carry."""
        found = re.search(r"===== conversation (\w+) =====", self.text)
        assert found
        return found[1]

    def part(self, name: str) -> str:
        """What stands between the marker line ``name`` and the next one."""
        found = re.search(rf"===== {name} {self.id} =====\n(.*?)\n===== ", self.text, re.DOTALL)
        assert found
        return found[1]

    def verdict(self, **values: str) -> str:
        return json.dumps({"id": self.id, **values})


def first_token(**logprobs: float) -> dict[str, Any]:
    """A choice whose one token has these log-probabilities beside it; the likeliest is what was said."""
    said = max(logprobs, key=logprobs.__getitem__)
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in logprobs.items()]
    content = [{"token": said, "logprob": logprobs[said], "bytes": None, "top_logprobs": top}]
    return {"message": {"role": "assistant", "content": said}, "logprobs": {"content": content}}


class ChatServer:
    """The server; ``requests`` are those it got, ``most`` the largest number it saw at the same time."""

    def __init__(self, reply: Callable[[Request], Any]) -> None:
        self.requests: list[Request] = []
        self.now = self.most = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    request = Request(body, dict(self.headers.items()), self.path, len(server.requests))
                    server.requests.append(request)
                    server.now += 1
                    server.most = max(server.most, server.now)
                answer = reply(request)
                with lock:
                    server.now -= 1
                given: Any = (200, answer, {}) if isinstance(answer, str | dict) else (*answer, {})[:3]
                status, text, headers = given
                if status == 200:
                    choice = (
                        text
                        if isinstance(text, dict)
                        else {"message": {"role": "assistant", "content": text}}
                    )
                    text = json.dumps({"choices": [{"finish_reason": "stop", **choice}]})
                data = text.encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                with suppress(ConnectionError):  # the client may have gone, as after Ctrl-C
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
