"""The MLflow run of a folder: all it says goes through a spool in the folder, so that no tracker can stop the work.

`mlflow.json` says which run it is (`parent.json` that of a sweep), `tracking.spool` what the tracker was not told yet.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from .jsonl import loads
from .redaction import redacted_values, without_credentials
from .settings import write_json
from .spool import Row, Spool
from .tracker import Unreachable, absolute, answering, client_of, metric_name, new_run, tell, with_credentials

RUN, PARENT, SPOOL = "mlflow.json", "parent.json", "tracking.spool"
LONGEST_PARAM, LONGEST_TAG = 500, 5000
FIRST, LAST, FOUNDING = 30.0, 30.0, 180.0
"""Seconds without headway after which a beginning or an end waits no longer for the tracker; nor does a sweep, which
may be one of several that wait while a busy machine makes their database."""
_log = logging.getLogger(__name__)


class Tracked:
    """A run of MLflow that belongs to a folder; it is made when the tracker first answers."""

    def __init__(self, folder: Path, uri: str, record: str = RUN) -> None:
        self.folder, self.uri = folder, uri
        self._record = folder / record
        self._spool = Spool(folder / SPOOL)
        self._warned = False

    @classmethod
    def begin(
        cls, folder: Path, uri: str, experiment: str, name: str, tags: Mapping[str, str], record: str = RUN
    ) -> Tracked:
        """The run of a folder, which now runs: a new one, or that which the folder has."""
        found = cls(folder, with_credentials(absolute(uri)), record)
        bare = without_credentials(found.uri)
        if found._record.exists():
            found.require(bare)
        else:
            told = {"mmrlhf.mark": uuid4().hex, "mlflow.source.name": "mmrlhf", "mlflow.source.type": "LOCAL", **tags}
            found.put({"begin": experiment, "name": name, "tags": told})  # first: a kill leaves no record without it
            write_json(found._record, {"uri": bare, "run": None})
        found.put({"status": "RUNNING"})
        return found

    @classmethod
    def of(cls, folder: Path, uri: str | None = None) -> Tracked:
        """The run that a folder has; `uri` is needed where MLFLOW_TRACKING_URI does not tell the password."""
        names = [name for name in (RUN, PARENT) if (folder / name).exists()]
        if not names:
            raise ValueError(f"{folder}: expected the folder of a run with {RUN} or {PARENT}, found none; check it")
        kept = loads((folder / names[0]).read_bytes())["uri"]
        found = cls(folder, with_credentials(kept if uri is None else absolute(uri)), names[0])
        found.require(without_credentials(found.uri))
        return found

    def require(self, bare: str) -> None:
        """Refuse another tracker than the one that has the run."""
        if (there := without_credentials(self.record()["uri"])) != bare:
            raise ValueError(
                f"{self._record}: this run is kept at {there}, got {bare}; say the former, or take another out"
            )

    def record(self) -> dict[str, Any]:
        """What the folder says of its run."""
        return dict(loads(self._record.read_bytes()))

    @property
    def run(self) -> str | None:
        """The id of the run, once there is one."""
        found: str | None = self.record()["run"]
        return found

    @property
    def is_new(self) -> bool:
        """Whether the tracker was told nothing yet."""
        return self.run is None

    def put(self, row: Row) -> None:
        """Say something: metrics (with a step), params, tags, an artifact (dict, text or file), or a status."""
        row = {"time": _now()} | dict(row)
        if "metrics" in row:  # whose names may end in `token`
            finite = ((name, float(value)) for name, value in row["metrics"].items())
            self._spool.append(row | {"metrics": {name: v if math.isfinite(v) else str(v) for name, v in finite}})
            return
        for kind, longest in (("params", LONGEST_PARAM), ("tags", LONGEST_TAG)):
            if kind in row:
                row[kind] = {name: str(value)[:longest] for name, value in redacted_values(row[kind]).items()}
        self._spool.append(redacted_values(row))

    def send(self) -> None:
        """Send all that waits, or raise `Unreachable`."""
        self._spool.drain(self._send)

    def _send(self, rows: Sequence[Row]) -> None:
        with answering(self.uri):
            run = self.run or self._made(next(row for row in rows if "begin" in row))
            tell(client_of(self.uri), run, self.folder, [row for row in rows if "begin" not in row])

    def _made(self, row: Row) -> str:
        run = new_run(self.uri, row["begin"], row["name"], row["tags"], row["time"])
        write_json(self._record, self.record() | {"run": run})
        return run

    def try_send(self) -> bool:
        """Send all that waits; if the tracker does not answer, say so once, and leave it for later."""
        try:
            self.send()
        except Unreachable as error:
            if not self._warned:
                _log.warning(
                    "the tracker does not answer (%s); the work goes on, what it says waits in %s, and is sent once it "
                    "answers, also by `mmrlhf runs --flush %s`",
                    error,
                    self.kept,
                    self.folder,
                )
            self._warned = True
            return False
        if self._warned:
            _log.info("the tracker answers again, and was told what had waited in %s", self.kept)
        self._warned = False
        return True

    def flush(self, patience: float = LAST) -> bool:
        """Send all that waits, but wait no longer than some seconds without any headway."""
        done: list[bool] = []
        sender = Thread(target=lambda: done.append(self.try_send()), daemon=True)
        sender.start()
        left = None
        while sender.is_alive() and left != (left := self._spool.waiting()):
            sender.join(patience)
        if not done:
            _log.warning(
                "%s: the tracker takes too long; `mmrlhf runs --flush %s` waits for it", self.kept, self.folder
            )
        return any(done)

    @property
    def kept(self) -> Path:
        """Where it waits."""
        return self._spool.path


class Sender:
    """Sends in the background what a run says, until it is stopped."""

    def __init__(self, tracked: Tracked, every: float = 1.0, pause: float = 15.0) -> None:
        """Look for something to send every so many seconds, and after a failure only after a pause."""
        self._tracked, self._every, self._pause = tracked, every, pause
        self._stopped = Event()
        Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        wait = self._every
        while not self._stopped.wait(wait):
            wait = self._every if self._tracked.try_send() else self._pause

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped.set()


def parent_run(folder: Path, uri: str, experiment: str, name: str, settings: Mapping[str, Any]) -> str:
    """The id of the run under which those of a sweep stand; made before any of them, with database and experiment.

    Its parameters are the plain values of the settings; all of them are its artifact `sweep.yaml`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracked = Tracked.begin(folder, uri, experiment, name, {}, PARENT)
    told = json.loads(json.dumps(dict(settings), default=str))
    plain = {key: value for key, value in told.items() if isinstance(value, str | int | float) and key != "tracking"}
    tracked.put({"params": plain})
    tracked.put({"dict": told, "path": "sweep.yaml"})
    tracked.flush(FOUNDING)
    if (run := tracked.run) is None:
        raise ValueError(
            f"tracking: expected {without_credentials(tracked.uri)} to answer before a sweep begins, got nothing; see "
            "the warning above"
        )
    return run


def log_outcomes(
    run_folder: Path,
    metrics: Mapping[str, float],
    files: Sequence[Path],
    tags: Mapping[str, str],
    uri: str | None = None,
    under: str = "outcomes",
) -> None:
    """Tell a finished run what came out of it: metrics, files in a folder, tags. Told again, nothing changes.

    A file replaces one of the same name in that folder.
    """
    tracked = Tracked.of(run_folder, uri)
    if tags:
        tracked.put({"tags": tags})
    if metrics:
        # The time of the files, so that the same metrics, told again, are the same points.
        times = [int(path.stat().st_mtime * 1000) for path in files]
        told = {metric_name(name): value for name, value in metrics.items()}
        tracked.put({"metrics": told, "step": 0, "time": max(times, default=_now())})
    _put_files(tracked, files, under)
    tracked.flush()


def _put_files(tracked: Tracked, files: Sequence[Path], to: str) -> None:
    for path in files:
        tracked.put({"file": str(path.resolve()), "to": to})


def end_run(folder: Path, status: str, files: Sequence[Path] = (), uri: str | None = None) -> None:
    """Say how a run ended (FINISHED, FAILED, KILLED), and give it files."""
    tracked = Tracked.of(folder, uri)
    _put_files(tracked, files, "")
    tracked.put({"status": status})
    tracked.flush()


def catch_up(folder: Path, uri: str | None) -> None:
    """Send what an earlier start in a folder could not."""
    if uri is not None and (folder / RUN).exists():
        Tracked.of(folder, uri).flush()


@contextmanager
def ending(folder: Path, uri: str | None, artifacts: Sequence[str]) -> Iterator[None]:
    """Say how the work in a folder ended, if it has a run, with the files of some patterns, each in its folder."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if uri is not None and (folder / RUN).exists():
            tracked = Tracked.of(folder, uri)
            for path in sorted(path for pattern in artifacts for path in folder.glob(pattern)):
                _put_files(tracked, [path], path.parent.relative_to(folder).as_posix())
            end_run(folder, status, uri=uri)


def _now() -> int:
    return int(time.time() * 1000)
