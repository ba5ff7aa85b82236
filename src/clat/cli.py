"""The command line: which command, and how it ends."""

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError

from clat.arguments import parse
from clat.commands import COMMANDS
from clat.errors import InputError
from clat.health import HealthError
from clat.integrity import IntegrityError
from clat.text import plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 (the run or the network is at fault), 2 (the input is) or 130 (interrupted)."""
    try:
        command, values = parse(sys.argv[1:] if arguments is None else arguments, COMMANDS)
        return COMMANDS[command](**values) or 0
    except InputError as error:
        return _fail(error, 2)
    except ArgumentError as error:
        return _fail(f"{str(error).rstrip('.')}; see clat COMMAND --help.", 2)
    except (HealthError, IntegrityError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("Interrupted; a training run continues with --resume.", 130)


def _fail(error: object, code: int) -> int:
    print(f"clat: {plain(' '.join(str(error).split()))}", file=sys.stderr)
    return code
