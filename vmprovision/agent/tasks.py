"""Waiting without blocking: generators that yield how long they want to rest."""

from . import compat


class Outcome(object):
    """What a task leaves for its caller; ``failure`` is None if it went well.

    ``hopeless`` is set where another way would fail likewise.
    """

    def __init__(self):
        self.status = None
        self.output = b""
        self.failure = None
        self.hopeless = False


def pauses(seconds, clock):
    """Rests, short ones first, until the time is up."""
    end = clock() + seconds
    pause = 0.01
    while clock() < end:
        yield min(pause, max(0.0, end - clock()))
        pause = min(pause * 2, 0.25)


def run_program(argv, seconds, outcome, clock, stdin=b"", function=None):  # noqa: PLR0913, PLR0917
    """Runs a program, or a function in a process of its own, and keeps its status and output.

    The status is None if the time was up first, 127 if there is no such program.
    """
    child = compat.Child(argv, stdin, function)
    try:
        for pause in pauses(seconds, clock):
            yield pause
            done = child.poll()
            if done is not None:
                child = None
                outcome.status, outcome.output = done
                return
    finally:
        if child is not None:
            child.kill()
