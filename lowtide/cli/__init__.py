"""The command line. What a user can correct is one sentence on stderr and exit code 2."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, cast

from lowtide.distributed.launch import launched
from lowtide.errors import BadInput

INTERRUPTED = 130
TERMINATED = 143
WRONG = 2
# Commands that keep their finished parts on disk. The same command goes on from there.
GOES_ON = ("quantize", "run", "sample", "evaluate", "compare", "demo", "bench quality")


def main() -> None:
    """Run the command that the arguments name."""
    before = signal.signal(signal.SIGTERM, _stopped if launched().several else _terminated)
    try:
        code = _run()
    except _Terminated:
        code = TERMINATED
    finally:
        if not launched().several:
            signal.signal(signal.SIGTERM, before)
    if code in (INTERRUPTED, TERMINATED) and launched().first:
        print(_interrupted(sys.argv[1:]), file=sys.stderr)
    sys.exit(code)


def _interrupted(arguments: list[str]) -> str:
    """What a user can do after a command with these arguments was stopped."""
    if " ".join(arguments).startswith(GOES_ON):
        return "interrupted; give the same command again to go on where it stopped"
    return "interrupted; nothing was changed"


class _Terminated(BaseException):
    """SIGTERM: the system or a scheduler ends the process."""


def _terminated(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _run() -> int:
    """Run it; the exit code."""
    import typer  # with the commands, so that `import lowtide` needs neither

    from lowtide.cli.commands import app

    # click's class, or typer's own copy of it.
    usage_error: type[Exception] = cast(type[Exception], typer.BadParameter.__bases__[0])
    try:
        with _first_speaks():
            code = app(standalone_mode=False) or 0
        if launched().several:
            _leave()
        return code
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


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Within the context, only the first process of torchrun writes to the terminal."""
    if launched().first:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _stopped(number: int, frame: object) -> NoReturn:
    """torchrun stops all processes when one has ended."""
    from lowtide.distributed.world import lost

    raise lost(launched().size)


def _leave() -> None:
    from lowtide.distributed.world import leave

    leave()


def _says(message: str) -> bool:
    """Whether this process prints the message: one of those that have it."""
    if not launched().several:
        return True
    from lowtide.distributed.world import says

    return says(message)


def _wrong_usage(error: Any) -> int:
    """A command line that no command takes; without any arguments, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return WRONG
    command = error.ctx.command_path if error.ctx else "lowtide"
    message = " ".join(error.format_message().split()).rstrip(".")
    return _fail(f"found {message}; expected a command and its options; see `{command} --help`")


def _fail(message: str) -> int:
    if launched().several:  # torchrun stops this process too, which has said why it ends
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _says(message):
        print(f"error: {message}.", file=sys.stderr)
    return WRONG


def _disk_is_full(error: Exception) -> bool:
    """Also as safetensors says it, whose errors are no OSError."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)
