"""Runs the command that was typed. Torch is imported only once the arguments have been checked."""

import os
import sys
import traceback
from collections.abc import Sequence

from clat.cli.arguments import read, values
from clat.errors import InputError
from clat.text import plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 (the run failed or the network did not pass), 2 (bad input) or 130 (interrupted).

    With ``--debug``, or CLAT_DEBUG in the environment, an error's traceback is shown too.
    """
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if "--debug" in given:
            os.environ["CLAT_DEBUG"] = "1"
        call = read([argument for argument in given if argument != "--debug"])
        _share_the_cores()
        from clat.cli.commands import COMMANDS
        from clat.cli.shared import sentences_for_warnings

        function = COMMANDS[call.command]
        with sentences_for_warnings():
            return function(**values(call, function)) or 0
    except InputError as error:
        return _fail(error, 2)
    except RuntimeError as error:
        from clat.training.health import HealthError
        from clat.training.integrity import IntegrityError

        if not isinstance(error, (HealthError, IntegrityError)):
            raise
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("Interrupted; a training run continues with --resume.", 130)


def _share_the_cores() -> None:
    """Where other programs compute, lets OpenMP's threads sleep while they wait; torch reads this when it is imported.

    Threads that spin keep a core that the one they wait for needs. Two threads on two cores at a load of 15: 30
    batches of the demo took 5 to 9 s with sleeping threads, and had not ended after 200 s with spinning ones.
    """
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 4:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _fail(error: object, code: int) -> int:
    if isinstance(error, Exception) and os.environ.get("CLAT_DEBUG"):
        traceback.print_exception(error)
    print(f"clat: {plain(' '.join(str(error).split()))}", file=sys.stderr)
    return code
