"""A tiny server that speaks the protocol of chat completions on this machine, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish="stop", **message):
    """The body of an answer."""
    message = {"role": "assistant", "content": text} | message
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


class Served:
    """What the next requests are answered with, and what they were.

    `answer` is a function of the request's body: a text, a body, or (status, body, headers); `DROP` closes the
    connection, a number waits for so many seconds first.
    """

    DROP = object()

    def __init__(self, answer):
        self.answer = answer
        self.asked, self.headers, self.paths = [], [], []
        self.together = self.most_together = 0
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        """Let the port go."""
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _handler(served):  # noqa: N805 - of the handler that is made here
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served.lock:
                    served.asked.append(body)
                    served.headers.append({name.lower(): value for name, value in self.headers.items()})
                    served.paths.append(self.path)
                    served.together += 1
                    served.most_together = max(served.most_together, served.together)
                try:
                    with suppress(ConnectionError):  # whoever asked may have gone
                        self.respond(served.answer(body))
                finally:
                    with served.lock:
                        served.together -= 1

            def respond(self, found):
                if found is Served.DROP:
                    self.connection.close()
                    self.close_connection = True
                    return
                if isinstance(found, tuple) and isinstance(found[0], float):
                    time.sleep(found[0])
                    found = found[1]
                status, body, headers = found if isinstance(found, tuple) else (200, found, {})
                body = completion(body) if isinstance(body, str) else body
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "application/json", "Content-Length": len(data)} | headers
                ).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        return Handler


def said(body):
    """All texts of a request, one after the other."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        found += [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    return "\n".join(found)
