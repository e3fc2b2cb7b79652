"""Processes that end with the one that started them.

Only Python's own modules are imported here, and errors: what holds the queue of progress is up at
once and needs neither PyTorch nor Flower, which take seconds to import.
"""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager

from fedsim.errors import ScenarioError

__all__ = ["start_manager", "start_worker"]


def start_manager() -> SyncManager:
    """Return a started process for the queue of progress.

    Raises
    ------
    ScenarioError
        If processes cannot be started, since the script that calls would start itself again.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    try:
        manager.start(initializer=_die_with_parent)
    except EOFError:
        raise ScenarioError(
            "jobs: more than 1 needs processes, which import the script that calls fedsim.run; "
            "put the call under  if __name__ == '__main__':"
        ) from None
    return manager


def start_worker() -> None:
    """Let the parent alone decide when a worker ends: on Ctrl-C, SIGTERM, or its own death."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception: files are closed


def _die_with_parent() -> None:
    """End this process as soon as its parent is no more, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
