"""Trackers for tests: databases that are made quickly, and a real MLflow server that can be stopped and started."""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
import threading
from functools import cache
from pathlib import Path

from werkzeug.serving import WSGIRequestHandler, make_server


@cache
def _kept():
    """What a folder is kept by while the tests run, with an empty database in it, whose making takes seconds."""
    from mmrlhf import tracker

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "mlflow.db"
    path.touch()
    tracker.client_of(f"sqlite:///{path}")
    return folder


def empty_database(folder):
    """The address of a database of one's own."""
    shutil.copy(Path(_kept().name) / "mlflow.db", folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


class Quiet(WSGIRequestHandler):
    """Tells of no request."""

    def log_request(self, *_):
        """Tell nothing."""


class Server:
    """MLflow's own server in a thread of this process, over a database that is there."""

    def __init__(self, patch, database, artifacts):
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(artifacts))
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        from mlflow.server import app

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app, self._port = app, 0
        self.start()
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self):
        """Listen, always at the same port."""
        self._server = make_server("127.0.0.1", self._port, self._app, threaded=True, request_handler=Quiet)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        """Refuse to connect from here on."""
        self._server.shutdown()
        self._server.server_close()


class Hanging:
    """Takes connections and never answers."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self):
        """Refuse to connect from here on."""
        self._socket.close()
