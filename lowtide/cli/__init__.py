"""The command line. What a user can correct is one sentence on stderr and exit code 2."""

import errno
import sys

from lowtide.errors import BadInput


def main() -> None:
    """Run the command that the arguments name."""
    from lowtide.cli.commands import app

    try:
        app(standalone_mode=True)
    except BadInput as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        sys.exit(
            _fail(
                "found the disk full; expected room for the result; "
                "free some space, nothing was changed"
            )
        )


def _fail(message: str) -> int:
    print(f"error: {message}.", file=sys.stderr)
    return 2


def _disk_is_full(error: Exception) -> bool:
    """Also as safetensors says it, whose errors are no OSError."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)
