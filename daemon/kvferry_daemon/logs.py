"""The daemon's log: one event a line, for people on a terminal, as JSON for whatever collects it."""

import json
import logging
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Literal, TextIO

from kvferry_daemon.core.events import Key
from kvferry_daemon.core.told import Told, TransferEnded, TransferOpened
from kvferry_daemon.plain import plain

log = logging.getLogger(__name__)
transfers = logging.getLogger("kvferry_daemon.transfers")
Format = Literal["auto", "human", "json"]
AUDIT = "kvferry.audit"
LINES_MAX = 2048
CLOSE_S = 2.0
FIELDS = "kvferry_fields"  # of a record: what else is told, by name


def about(key: Key, **more: object) -> dict[str, dict[str, object]]:
    """The ``extra`` of a line about one side of a transfer; None is not told."""
    told = {"transfer_id": key.transfer_id, "role": key.role.value, "attempt": key.attempt, **more}
    return fields(**told)


def fields(**told: object) -> dict[str, dict[str, object]]:
    """The ``extra`` of a line that has fields; None is not told."""
    return {FIELDS: {name: value for name, value in told.items() if value is not None}}


class JsonLines(logging.Formatter):
    """An object a line; see docs/operations.md for its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, whatever it is made of."""
        line: dict[str, object] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """Time, level, what happened, and to which transfer; an exception's lines stand below it."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        told = "".join(f" {name}={plain(str(v))}" for name, v in _fields_of(record).items())
        name = record.name.removeprefix("kvferry_daemon.")
        what = plain(record.getMessage())
        line = f"{at}.{int(record.msecs):03d} {record.levelname:7} {name}: {what}{told}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Waiting:
    """Lines that are to be written, up to a bound of their own."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines: deque[str] = deque()
        self.dropped = 0
        self.untold = 0  # of the dropped ones


class WriterThread(logging.Handler):
    """Writes lines in a thread, so that whoever does not read them holds nothing up.

    What does not fit into its queue is dropped, and counted in a line of its own. The audit log has
    a queue to itself, which is written first: no flood of other lines takes its place.
    """

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self.audit, self.other = _Waiting("audit lines"), _Waiting("lines")
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="kvferry-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Format it now: what it is about may change.

        A line that cannot be made is told of as one of ours. ``logging`` itself would be silent:
        NIXL's import turns ``logging.raiseExceptions`` off for the whole process.
        """
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - a wrong line must not fail whoever wrote it
            line = self.format(_line_not_made(record, error))
        waiting = self._of(record)
        with self._changed:
            if len(waiting.lines) >= LINES_MAX:
                self._drop(waiting, 1)
            else:
                waiting.lines.append(line)
                self._changed.notify()

    def close(self) -> None:
        """Write what is left, for a while."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        super().close()

    def _of(self, record: logging.LogRecord) -> _Waiting:
        return self.audit if record.name == AUDIT else self.other

    def _drop(self, waiting: _Waiting, count: int) -> None:
        waiting.dropped += count
        waiting.untold += count

    def _next(self) -> tuple[_Waiting, str] | None:
        """The line to write now; None: there is none, and there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self.audit.lines or self.other.lines)
            for waiting in (self.audit, self.other):
                if waiting.lines:
                    return waiting, waiting.lines.popleft()
        return None

    def _write_all(self) -> None:
        while (found := self._next()) is not None:
            self._write(*found)
            for waiting in (self.audit, self.other):
                if count := self._take_untold(waiting):
                    self._write(waiting, self.format(_line_of_dropped(count, waiting.what)))

    def _take_untold(self, waiting: _Waiting) -> int:
        with self._changed:
            count, waiting.untold = waiting.untold, 0
        return count

    def _write(self, waiting: _Waiting, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError:  # whoever read is gone; the daemon goes on without him
            with self._changed:
                self._drop(waiting, 1)


def dropped() -> tuple[int, int]:
    """How many lines of this process were never written, and how many of its audit log."""
    writers = [one for one in logging.getLogger().handlers if isinstance(one, WriterThread)]
    return sum(one.other.dropped for one in writers), sum(one.audit.dropped for one in writers)


def begin(level: str, form: Format) -> None:
    """From now on everything that the process logs goes to stderr in this form.

    ``auto``: as JSON, unless stderr is a terminal.
    """
    human = form == "human" or (form == "auto" and sys.stderr.isatty())
    handler = WriterThread(sys.stderr, HumanLines() if human else JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger(AUDIT).setLevel(logging.INFO)  # whoever sets the level must not silence it
    logging.captureWarnings(True)
    sys.excepthook = _crashed
    threading.excepthook = _thread_crashed


def tell(event: Told) -> None:
    """Log how a transfer goes."""
    match event:
        case TransferOpened() if transfers.isEnabledFor(logging.DEBUG):
            what = "taken up again" if event.again else "opened"
            more: dict[str, Any] = {"worker": event.worker or None, "source": event.source}
            transfers.debug("transfer %s", what, extra=about(event.key, **more))
        case TransferEnded():
            more = {
                "sent_tokens": event.sent_tokens,
                "total_tokens": event.total_tokens,
                "took_s": round(event.took_s, 3),
            }
            if event.error is None:
                transfers.info("transfer ended well", extra=about(event.key, **more))
            else:
                more |= {"error": str(event.error.code), "fault": str(event.error.fault)}
                more["why"] = event.error.message
                transfers.warning("transfer failed", extra=about(event.key, **more))


def _line_of_dropped(count: int, what: str) -> logging.LogRecord:
    return _own_line(logging.WARNING, f"{count} {what} were dropped: nobody read them")


def _line_not_made(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    at = f"{record.pathname}:{record.lineno}"
    return _own_line(
        logging.ERROR, f"a log line of {at} could not be made: {record.msg!r}: {error!r}"
    )


def _own_line(level: int, words: str) -> logging.LogRecord:
    about = {"name": log.name, "levelno": level, "levelname": logging.getLevelName(level)}
    return logging.makeLogRecord({**about, "msg": words})


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    told: dict[str, object] = getattr(record, FIELDS, {})
    return told


def _utc(record: logging.LogRecord) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{at}.{int(record.msecs):03d}Z"


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("the daemon ends by a fault of ours", exc_info=(kind, error, trace))


def _thread_crashed(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        seen = (args.exc_type, args.exc_value, args.exc_traceback)
        log.critical("a thread ended by a fault of ours", exc_info=seen)
