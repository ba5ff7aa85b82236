"""What a process does when another one of its run dies: it stops within a minute, with one sentence.

Besides what they compute, the processes count each other once a second, in a thread and a process group of its own. A
process that was killed closes its connections, and one that hangs, or whose machine or network is down, misses the
time limit. Either ends the others at once, wherever they wait, so no GPU waits for a message that never comes.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

PATIENCE = 30.0  # seconds without a sign of life
PAUSE = 1.0  # seconds between two counts
GRACE = 10.0  # seconds that all processes have to stop for the same reason

ALIVE, DONE, FAILED = range(3)


@contextmanager
def counted(rank: int, count: int) -> Iterator[None]:
    """Inside the block, the end of any other process ends this one, unless all leave the block together."""
    if count == 1:
        yield
        return
    leaving = _Leaving()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
    thread = threading.Thread(target=_count, args=(group, leaving, rank), name="clat peers", daemon=True)
    thread.start()
    restore = _on_sigterm(lambda: _end(rank, "was told to stop by its launcher, as when another process has ended"))
    try:
        yield
        leaving.state = DONE
    except BaseException as error:
        leaving.state, leaving.error = FAILED, error
        raise
    finally:
        leaving.event.set()
        thread.join()  # where another process is gone, this ends here, before a message about its connection
        restore()
    dist.destroy_process_group(group)


class _Leaving:
    """Whether this process is about to leave the block, and how."""

    def __init__(self) -> None:
        self.event, self.state = threading.Event(), ALIVE
        self.error: BaseException | None = None

    def for_the_same_reason(self) -> bool:
        """Whether this process leaves too, soon, and not because the one that failed does not answer any more."""
        left = self.event.wait(GRACE)
        return left and type(self.error) is not RuntimeError and not isinstance(self.error, dist.DistError)


def _count(group: Any, leaving: _Leaving, rank: int) -> None:
    """Tells the others how this process is and hears how they are, until one leaves."""
    while True:
        own = leaving.state
        worst = torch.tensor([own])
        try:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
        except RuntimeError:
            _end(rank, "stops, as another process has ended or cannot be reached")
        if worst.item() == FAILED != own and not leaving.for_the_same_reason():
            _end(rank, "stops, as another process has failed; what that one says is the cause")
        if worst.item() != ALIVE:
            return
        leaving.event.wait(PAUSE)


def _end(rank: int, why: str) -> NoReturn:
    """Ends the process from any thread. The run folder bears that at any moment."""
    said = f"clat: Process {rank} {why}; --resume continues the run after its last finished epoch.\n"
    os.write(2, said.encode())
    os._exit(1)


def _on_sigterm(action: Callable[[], None]) -> Callable[[], object]:
    """Lets SIGTERM run an action, where this is the main thread; returns what undoes that."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    return lambda: signal.signal(signal.SIGTERM, before)
