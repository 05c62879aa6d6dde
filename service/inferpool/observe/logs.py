"""Log lines: for people on a terminal, as JSON for machines. Never a payload."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

from inferpool.observe.background import BackgroundWorker
from inferpool.observe.request_record import Record

ACCESS: Final = "inferpool.access"
"""The logger of the lines that requests leave."""

CLOSE_S: Final = 1.0
"""How long what waits may take to be written at the end."""

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


class LineFormatter(logging.Formatter):
    """Makes a line of a log record, or of its parts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a log record; what was passed as `extra` stands beside the message."""
        fields = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        exception = self.formatException(record.exc_info) if record.exc_info else None
        return self.line(
            record.created, record.levelname, record.name, record.getMessage(), fields, exception
        )

    def line(
        self,
        time: float,
        level: str,
        logger: str,
        message: str,
        fields: Mapping[str, Any],
        exception: str | None = None,
    ) -> str:
        """The line; `time` is Unix time in seconds."""
        raise NotImplementedError


class JsonFormatter(LineFormatter):
    """One JSON object a line."""

    def line(
        self,
        time: float,
        level: str,
        logger: str,
        message: str,
        fields: Mapping[str, Any],
        exception: str | None = None,
    ) -> str:
        """The object; its keys are those of `fields` beside time, level, logger and message."""
        line = {"time": _iso(time), "level": level.lower(), "logger": logger, "message": message, **fields}
        if exception is not None:
            line["exception"] = exception
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:
            # File names may be no Unicode; such text is escaped here, where orjson refuses it.
            return json.dumps(line, default=str)


class ConsoleFormatter(LineFormatter):
    """`12:34:56.789 INFO     message key=value`."""

    def line(
        self,
        time: float,
        level: str,
        logger: str,
        message: str,
        fields: Mapping[str, Any],
        exception: str | None = None,
    ) -> str:
        """The line, and the traceback below it if there is one."""
        extra = "".join(f" {key}={value}" for key, value in fields.items() if value is not None)
        # A client chooses some of what is logged; it must not be able to start a line of its own.
        message = message.replace("\n", "\\n").replace("\r", "\\r")
        line = f"{_iso(time)[11:23]} {level:<8} {message}{extra}"
        return line if exception is None else f"{line}\n{exception}"


class LineHandler(logging.Handler):
    """Has lines written by a thread of its own, so that no logging call waits for whoever reads them."""

    def __init__(self, stream: TextIO, formatter: LineFormatter) -> None:
        """`stream` must be a file's: lines go to its descriptor.

        A thread that writes to the stream itself holds its lock while it does, and where nobody reads Python
        could not flush the stream at its end.
        """
        super().__init__()
        self._file = stream.fileno()
        self._encoding = stream.encoding
        self._lines = formatter
        self.setFormatter(formatter)
        self._aside = BackgroundWorker[str | Record]("log", self._write, self._report)

    def emit(self, record: logging.LogRecord) -> None:
        """Have a log record's line written soon: it may be the last of a process that dies."""
        try:
            line = self.format(record)
        except Exception as fault:  # noqa: BLE001 - what goes wrong in logging must not end what is logged
            message = f"a line could not be made of {record.msg!r}: {fault!r}"
            line = self._lines.line(record.created, "ERROR", record.name, message, {})
        self._aside.put(line)
        self._aside.hurry()

    def put(self, record: Record) -> None:
        """Have a request's line written."""
        self._aside.put(record)

    def close(self) -> None:
        """Write what waits, for a bounded time; Python does it at its end."""
        self._aside.close(CLOSE_S)
        super().close()

    def _write(self, items: Sequence[str | Record]) -> None:
        lines = (item if isinstance(item, str) else self._access_line(item) for item in items)
        data = "".join(f"{line}\n" for line in lines).encode(self._encoding, "backslashreplace")
        # Where nobody can take lines any more there is nobody to tell either.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._file, data) :]

    def _access_line(self, record: Record) -> str:
        level = logging.getLevelName(_level(record.status))
        return self._lines.line(record.time, level, ACCESS, "predict", request_fields(record))

    def _report(self, message: str) -> None:
        # Not by way of the logger: who closes this handler holds its lock, and waits for this thread.
        self._write([self._lines.line(time.time(), "WARNING", __name__, message, {})])


class AccessLog:
    """One line a predict request.

    A request that ended with 500 is an error and always logged; every other only where that is wanted.
    """

    def __init__(self, handler: LineHandler, *, every: bool) -> None:
        self._handler = handler
        # A status from here on is logged: as the level of the lines is, so is that of these.
        self._level = logging.getLogger(ACCESS).getEffectiveLevel() if every else logging.ERROR

    def wants(self, status: int) -> bool:
        """Whether a request that ended with `status` is logged."""
        return _level(status) >= self._level

    def put(self, record: Record) -> None:
        """Log a request; at once done, whatever the stream does."""
        self._handler.put(record)


def configure_logs(level: str, style: str, stream: TextIO = sys.stderr) -> LineHandler:
    """Send every log line to `stream`; `style` is console, json or auto (console on a terminal)."""
    console = style == "console" or (style == "auto" and stream.isatty())
    handler = LineHandler(stream, ConsoleFormatter() if console else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its start and stop lines say again what ours say.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return handler


def _level(status: int) -> int:
    """500 is a defect, of the server or of a model; 503 and 504 say that it is loaded or not ready."""
    if status < 500:
        return logging.INFO
    return logging.ERROR if status == 500 else logging.WARNING


def request_fields(record: Record) -> dict[str, Any]:
    """What a request's line says beside its time and level."""
    return {
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
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")
