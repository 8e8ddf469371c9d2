"""The kinds of failure that a person reads, and the exit codes that a scheduler reads."""

DONE = 0
FAILURE = 1
USER_MISTAKE = 2
STOPPED = 75  # stopped on request: start the same command again and the run goes on
HANG = 76  # no progress for launch.timeout seconds; which rank was late is in the attempt's hang.json
BAD_NODE = 77  # a machine failed its checks
SAME_CRASH = 78  # the same crash twice at the same step: starting again would not help


class BigtrainError(Exception):
    """Shown as one message without a traceback; `code` becomes the exit code of the process."""

    code = FAILURE


class UserError(BigtrainError):
    """Something that the user can mend: the message names the file, key or row, what was expected and what to do."""

    code = USER_MISTAKE


class RunError(BigtrainError):
    """The run cannot go on (a full disk, a non-finite loss, a lost rank); the message says what is safe on disk."""


class LostRun(RunError):
    """Another attempt has taken the run over: this one must write no more, and end."""


class BadNode(BigtrainError):
    """A machine cannot do its part of a run, or too many cannot; the message names them, for the others know nothing of it."""

    code = BAD_NODE


class StopRequested(BigtrainError):
    """A signal asked the run to stop; the checkpoint is written and the same command resumes it."""

    code = STOPPED


class AlreadyDone(BigtrainError):
    """The run has reached its end before: nothing is left to do, and that is no failure."""

    code = DONE
