"""Log lines: text for a terminal or JSON for machines, and never a payload."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TextIO

import orjson

from inferpool.observe.background import BackgroundWorker
from inferpool.observe.request_record import RequestRecord
from inferpool.system.files import printable

log = logging.getLogger(__name__)

ACCESS: Final = "inferpool.access"
"""The logger name of the access log."""

THROTTLE_S: Final = 60.0
"""How often a failure of one model and code has a line at most, in seconds."""

CLOSE_S: Final = 1.0
"""How long the process may take at its end to write the waiting lines."""

_LOCK_S: Final = 0.2
"""How long a process waits for another one that writes to the same stream."""

_LOCK_PAUSE_S: Final = 0.002

_STANDARD_FIELDS: Final = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


class LogLine(NamedTuple):
    """The values of one line of the log.

    Attributes:
        time: Unix time in seconds.
        level: the name of the level, in capitals.
        logger: who writes the line.
        message: the text.
        fields: what else is known, by name.
        exception: the traceback, or None.
    """

    time: float
    level: str
    logger: str
    message: str
    fields: Mapping[str, Any]
    exception: str | None = None


class LineFormatter(logging.Formatter):
    """Formats a log record, or the values of one, as a line."""

    def __init__(self, process: str = "") -> None:
        """`process` is the name of this process in the lines; empty if the server has only this one."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a log record, with the fields that the call passed as `extra`."""
        fields = {key: value for key, value in record.__dict__.items() if key not in _STANDARD_FIELDS}
        exception = self.formatException(record.exc_info) if record.exc_info else None
        return self.text(
            LogLine(record.created, record.levelname, record.name, record.getMessage(), fields, exception)
        )

    def text(self, line: LogLine) -> str:
        """Return the text of `line`."""
        raise NotImplementedError


class JsonFormatter(LineFormatter):
    """One JSON object per line."""

    def text(self, line: LogLine) -> str:
        """Return an object of all values; `exception` is left out if there is none."""
        time, level, logger, message, fields, exception = line
        process = {"process": self._process} if self._process else {}
        values = {
            "time": _iso(time),
            "level": level.lower(),
            **process,
            "logger": logger,
            "message": message,
            **fields,
        }
        if exception is not None:
            values["exception"] = exception
        try:
            return orjson.dumps(values, default=str).decode()
        except orjson.JSONEncodeError:
            # orjson refuses text that is not valid Unicode, which file names can contain; `json` escapes it.
            return json.dumps(values, default=str)


class ConsoleFormatter(LineFormatter):
    """`12:34:56.789 INFO     message key=value`, or `12:34:56.789 INFO     web-1: message key=value`."""

    def text(self, line: LogLine) -> str:
        """Return the line, followed by the traceback if there is one."""
        extra = "".join(f" {key}={value}" for key, value in line.fields.items() if value is not None)
        # Clients choose a part of some messages. They must not be able to start a line of their own.
        # Nor to control the terminal that shows it.
        who = f"{self._process}: " if self._process else ""
        text = printable(f"{_iso(line.time)[11:23]} {line.level:<8} {who}{line.message}{extra}")
        return text if line.exception is None else f"{text}\n{line.exception}"


class LineHandler(logging.Handler):
    """Writes lines in a thread of its own, so that no logging call waits for the reader of the log."""

    def __init__(self, stream: TextIO, formatter: LineFormatter, *, shared: bool = False) -> None:
        """Write to the file descriptor of `stream`; `shared` if other processes write to it too.

        The stream itself is not used: a blocked write would hold its lock, and Python could not flush
        the stream when it ends.
        """
        super().__init__()
        self._file = stream.fileno()
        self._encoding = stream.encoding
        self._shared = shared
        self._formatter = formatter
        self.setFormatter(formatter)
        self._worker = BackgroundWorker[str | RequestRecord]("log", self._write, self._report)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a log record soon: it may be the last of a process that dies."""
        try:
            line = self.format(record)
        except Exception as fault:  # noqa: BLE001 - an error in logging must not end the code that logs
            message = f"the log record {record.msg!r} could not be formatted: {fault!r}"
            line = self._formatter.text(LogLine(record.created, "ERROR", record.name, message, {}))
        self._worker.put(line)
        self._worker.flush_soon()

    def put(self, record: RequestRecord) -> None:
        """Write the line of a request."""
        self._worker.put(record)

    def close(self) -> None:
        """Write the waiting lines within a bounded time; Python calls this at its end."""
        self._worker.close(CLOSE_S)
        super().close()

    def _write(self, items: Sequence[str | RequestRecord]) -> None:
        lines = (item if isinstance(item, str) else self._access_line(item) for item in items)
        data = "".join(f"{line}\n" for line in lines).encode(self._encoding, "backslashreplace")
        # If the stream is broken, the error cannot be reported either.
        with contextlib.suppress(OSError), self._alone():
            while data:
                data = data[os.write(self._file, data) :]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes of the server from writing, so that each line stays in one piece.

        A pipe takes more than 4096 bytes in several steps. A process that was stopped while it wrote must not
        stop the logs of all others, so the wait is short. The kernel ends the lock with the process.
        """
        locked = False
        for _ in range(round(_LOCK_S / _LOCK_PAUSE_S) if self._shared else 0):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(_LOCK_PAUSE_S)
                continue
            except OSError:  # not every stream can be locked
                break
            locked = True
            break
        try:
            yield
        finally:
            if locked:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _access_line(self, record: RequestRecord) -> str:
        level = logging.getLevelName(_level(record.status))
        return self._formatter.text(LogLine(record.time, level, ACCESS, "predict", request_fields(record)))

    def _report(self, message: str) -> None:
        # The logger is not used: `close` holds the lock of this handler while it waits for this thread.
        self._write([self._formatter.text(LogLine(time.time(), "WARNING", __name__, message, {}))])


class AccessLog:
    """Logs predict requests, one line each: all of them, or only failures.

    Failures are requests that ended with status 500, and of those with 503 and 504 one of each model and code
    in `THROTTLE_S`: a server under overload ends thousands of them a second.
    """

    def __init__(self, handler: LineHandler, *, every: bool) -> None:
        self._handler = handler
        self._every = every
        # The configured log level holds for these lines too.
        level = logging.getLogger(ACCESS).getEffectiveLevel()
        self._level = level if every else max(level, logging.WARNING)
        self._shown: dict[tuple[str | None, str], tuple[float, int]] = {}

    def wants(self, status: int) -> bool:
        """Whether requests that ended with `status` are logged."""
        return _level(status) >= self._level

    def throttles(self, status: int) -> bool:
        """Whether not every request that ended with `status` has a line; `admit` says which ones have."""
        return not self._every and status != 500

    def admit(self, model: str | None, code: str, now: float) -> int:
        """Return how many requests with this model and code had no line since the last; -1 for no line now.

        `now` is the Unix time in seconds. `model` must be one of the repository's, because names are kept.
        """
        known = self._shown.get((model, code))
        if known is None or not 0.0 <= now - known[0] < THROTTLE_S:
            self._shown[model, code] = (now, 0)
            return 0 if known is None else known[1]
        self._shown[model, code] = (known[0], known[1] + 1)
        return -1

    def put(self, record: RequestRecord) -> None:
        """Log a request; returns at once, whatever the stream does."""
        self._handler.put(record)


def configure_logs(level: str, style: str, stream: TextIO | None = None, *, process: str = "") -> LineHandler:
    """Send every log line to `stream`, by default the standard error of the process.

    `style` is `console`, `json` or `auto`, which is console on a terminal. The stream must have a file
    descriptor. `process` is the name of this process in the lines, if the server has several.
    """
    # Whatever replaces `sys.stderr`, a test for example, may have no descriptor.
    stream = stream or sys.__stderr__ or sys.stderr
    console = style == "console" or (style == "auto" and stream.isatty())
    handler = LineHandler(
        stream, ConsoleFormatter(process) if console else JsonFormatter(process), shared=bool(process)
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # uvicorn's lines about start and stop repeat our own.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return handler


def report_stopped(status: int) -> None:
    """Log the end of the server, which is its last line; `status` is the exit status of the process."""
    if status == 0:
        log.info("stopped: every accepted request was answered")
    else:
        log.error("stopped with status %d; the lines before this one say why", status)


def _level(status: int) -> int:
    """The level of a status: 500 is a defect; 503 and 504 mean overload or a model that is not ready."""
    if status < 500:
        return logging.INFO
    return logging.ERROR if status == 500 else logging.WARNING


def request_fields(record: RequestRecord) -> dict[str, Any]:
    """The fields of a request's line, without time and level."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "status": record.status,
        "code": record.code,
        "model": record.model,
        "version": record.version,
        "rows": record.rows,
        "batch_rows": record.batch_rows,
        "queue_ms": _ms(record.queue_s),
        "compute_ms": _ms(record.compute_s),
        "total_ms": _ms(record.total_s),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        "tenant": record.tenant,
        "key": record.key,
        "client": record.client,
        "method": record.method,
        "path": record.path,
    }
    if record.left_out:
        fields["left_out"] = record.left_out
    return fields


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")
