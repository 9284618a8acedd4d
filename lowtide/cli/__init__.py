"""The command line. What a user can correct is one sentence on stderr and exit code 2."""

import errno
import sys
from typing import Any, cast

from lowtide.errors import BadInput

INTERRUPTED = 130
WRONG = 2


def main() -> None:
    """Run the command that the arguments name."""
    code = _run()
    if code == INTERRUPTED:
        print("interrupted; the same command continues a quantization", file=sys.stderr)
    sys.exit(code)


def _run() -> int:
    """Run it; the exit code."""
    import typer  # with the commands, so that `import lowtide` needs neither

    from lowtide.cli.commands import app

    # click's class, or typer's own copy of it.
    usage_error: type[Exception] = cast(type[Exception], typer.BadParameter.__bases__[0])
    try:
        return app(standalone_mode=False) or 0
    except BadInput as error:
        return _fail(str(error))
    except usage_error as error:
        return _wrong_usage(error)
    except typer.Abort as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None
        return INTERRUPTED
    except Exception as error:
        if not _disk_is_full(error):
            raise
        return _fail(
            "found the disk full; expected room for the result; "
            "free some space, nothing was changed"
        )


def _wrong_usage(error: Any) -> int:
    """A command line that no command takes; without any arguments, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return WRONG
    command = error.ctx.command_path if error.ctx else "lowtide"
    message = " ".join(error.format_message().split()).rstrip(".")
    return _fail(f"found {message}; expected a command and its options; see `{command} --help`")


def _fail(message: str) -> int:
    print(f"error: {message}.", file=sys.stderr)
    return WRONG


def _disk_is_full(error: Exception) -> bool:
    """Also as safetensors says it, whose errors are no OSError."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)
