"""How the log looks: lines for people or JSON for machines; an event is one line, always."""

import json
import logging
import sys
import time

FORMATS = ("human", "json")
LEVELS = ("debug", "info", "warning", "error")


class HumanFormatter(logging.Formatter):
    """`12:34:56 INFO server.routes request finished id=...`; control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """See Formatter."""
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = _one_line(record.getMessage())
        line = f"{when} {record.levelname} {record.name} {message}"
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See Formatter."""
        entry = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _one_line(text: str) -> str:
    """A message that cannot forge another: no line breaks, no terminal's escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def configure(*, kind: str = "human", level: str = "INFO") -> None:
    """Set up the process's log, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else HumanFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
