"""Log lines: for people on a terminal, as JSON for machines. Never a payload."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

from service.aside import Aside
from service.record import Record

ACCESS: Final = "inferpool.access"
"""The logger of the lines that requests leave."""

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
    """Writes lines to a stream; other threads' lines stay whole beside it."""

    def __init__(self, stream: TextIO, formatter: LineFormatter) -> None:
        super().__init__()
        self._stream = stream
        self.lines = formatter
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a log record."""
        try:
            self.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - what goes wrong in logging must not end what is logged
            self.handleError(record)

    def write(self, text: str) -> None:
        """Write whole lines."""
        self.acquire()
        try:
            self._stream.write(text)
            self._stream.flush()
        finally:
            self.release()


class AccessLog:
    """One line a predict request, formatted and written by a thread beside the event loop.

    A request that ended with 500 is an error and always logged; every other only where that is wanted.
    """

    def __init__(self, handler: LineHandler, *, every: bool) -> None:
        self._handler = handler
        # A status from here on is logged: as the level of the lines is, so is that of these.
        self._level = logging.getLogger(ACCESS).getEffectiveLevel() if every else logging.ERROR
        self._aside = Aside[Record]("access log", self._write)

    def wants(self, status: int) -> bool:
        """Whether a request that ended with `status` is logged."""
        return _level(status) >= self._level

    def put(self, record: Record) -> None:
        """Log a request; at once done, whatever the stream does."""
        self._aside.put(record)

    def close(self, timeout_s: float) -> None:
        """Write what waits."""
        self._aside.close(timeout_s)

    def _write(self, records: Sequence[Record]) -> None:
        line = self._handler.lines.line
        self._handler.write(
            "".join(
                line(
                    record.time, logging.getLevelName(_level(record.status)), ACCESS, "predict",
                    request_fields(record),
                )
                + "\n"
                for record in records
            )
        )  # fmt: skip


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
