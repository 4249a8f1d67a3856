"""The soft interrupt: an exception in the main thread, raised only where it can do no harm to the
runtime itself.

The signal handler looks at the frames under it. Inside `guarded` (a cell, or what belongs to it) it
raises; inside a shielded function (half a frame written) it waits until that is done; anywhere else
it does nothing. A signal that the host did not ask for, such as one from a thread of an earlier
cell, does nothing either.
"""

from __future__ import annotations

from _signal import (
    ITIMER_PROF,
    ITIMER_REAL,
    ITIMER_VIRTUAL,
    SIG_BLOCK,
    SIG_SETMASK,
    SIG_UNBLOCK,
    SIGALRM,
    SIGINT,
    getsignal,
    pthread_kill,
    pthread_sigmask,
    set_wakeup_fd,
    setitimer,
    signal,
    valid_signals,
)
from _thread import get_ident
from faulthandler import cancel_dump_traceback_later

TIMERS = (ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF)
_main = get_ident()
_shielded: list = []
_state = {"pending": False, "why": ""}  # why: set by the host's interrupt alone


class CellTimeout(KeyboardInterrupt):
    """The cell was interrupted: it ran too long, or the run was cancelled."""


def guarded(function, *args):
    """Call something that may run a cell's code; only in here an interrupt is raised."""
    return function(*args)


_guard = guarded.__code__


def shield(function) -> None:
    _shielded.append(function.__code__)


def _on_signal(_number, frame) -> None:
    if not _state["why"]:
        return
    while frame is not None:
        code = frame.f_code
        for shielded in _shielded:
            if code is shielded:
                _state["pending"] = True
                return
        if code is _guard:
            raise CellTimeout(_state["why"])
        frame = frame.f_back


def deliver() -> None:
    """Raise an interrupt that came at a bad moment."""
    if _state["pending"] and get_ident() == _main:
        _state["pending"] = False
        raise CellTimeout(_state["why"])


_handlers = {
    number: getsignal(number) for number in valid_signals() if getsignal(number) is not None
}
_handlers[SIGINT] = _on_signal


def disarm() -> None:
    """After a cell: no timer of its is left, and every signal is handled as before."""
    cancel_dump_traceback_later()  # a thread of C that ends the process when its time has come
    for timer in TIMERS:
        setitimer(timer, 0)
    for number, handler in _handlers.items():
        if getsignal(number) is not handler:
            signal(number, handler)


def arm() -> None:
    """Before a cell: our handler is in place, and nothing that would keep it from being called."""
    _state["pending"], _state["why"] = False, ""
    set_wakeup_fd(-1)
    pthread_sigmask(SIG_SETMASK, ())
    disarm()


def interrupt(why: str) -> None:
    """Interrupt the main thread (called from the reading thread)."""
    _state["why"] = why
    pthread_kill(_main, SIGINT)


def block() -> None:
    """A thread started from now on does not take signals: the main thread is the one to be
    interrupted."""
    pthread_sigmask(SIG_BLOCK, {SIGINT, SIGALRM})


def unblock() -> None:
    pthread_sigmask(SIG_UNBLOCK, {SIGINT, SIGALRM})
