"""Errors as a person meets them: one line, and whose mistake it was."""


class UsageError(ValueError):
    """The command line names or sets something that cannot be."""


def one_line(error: BaseException) -> str:
    """The message with its notes; the type too unless the message was written for people."""
    parts = [str(error), *getattr(error, "__notes__", [])]
    text = " ".join(" ".join(part.split()) for part in parts if part.strip())
    if text and isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
