"""Wait without blocking: generators that yield the length of their pauses.

They may also yield another generator, to wait for it; ``flow`` runs those.
"""

from . import compat


class Outcome(object):
    """The result of a task; ``failure`` is None if it succeeded.

    ``hopeless`` is set if another way would fail too.
    """

    def __init__(self):
        self.status = None
        self.output = b""
        self.failure = None
        self.hopeless = False


def pauses(seconds, clock):
    """Yield pauses, short ones first, until the time limit."""
    end = clock() + seconds
    pause = 0.01
    while clock() < end:
        yield min(pause, max(0.0, end - clock()))
        pause = min(pause * 2, 0.25)


def flow(task):
    """Yield the pauses of a task and, in their place, those of the tasks that it yields.

    An exception of one goes to the task that yielded it. Closing closes all of them,
    the innermost first; MicroPython would not do that by itself, and each would leak
    its resources.
    """
    stack = [task]
    raised = None
    try:
        while stack:
            try:
                step = stack[-1].throw(raised) if raised is not None else next(stack[-1])
                raised = None
            except StopIteration:
                raised = None
                stack.pop()
            except Exception as error:
                raised = error
                stack.pop()
            else:
                if hasattr(step, "close"):
                    stack.append(step)
                else:
                    yield step
        if raised is not None:
            raise raised
    finally:
        while stack:
            stack.pop().close()


def run_program(argv, seconds, outcome, clock, stdin=b"", function=None):  # noqa: PLR0913, PLR0917
    """Run a program, or a function in a child process, and keep its status and output.

    The status is None at the time limit, 127 if there is no such program. If no process
    can be started, ``outcome.failure`` says why.
    """
    try:
        child = compat.Child(argv, stdin, function)
    except compat.FILE_ERRORS as error:
        outcome.failure = compat.describe_error(error)
        return
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
