"""`bigtrain ...` among libraries that print secrets: in every way that Python has, before there is a log and after."""

import logging
import os
import sys
import warnings

from bigtrain import logs, metrics, trackers


def chatter() -> None:
    for name in os.environ["LEAKED"].split():
        value = os.environ[name]
        print("stdout:", value)
        print(f"stderr: {value}", file=sys.stderr)
        sys.stdout.buffer.write(b"bytes: " + value.encode() + b"\n")
        for half in (value[: len(value) // 2], value[len(value) // 2 :], "\n"):
            sys.stderr.write(half)
        logging.getLogger("library").warning("logged: %s", value)
        warnings.warn(f"warned: {value}", stacklevel=1)
        try:
            raise ValueError(value)
        except ValueError:
            logging.getLogger("library").exception("raised")


class Leaky(logs.RankOutput):
    def __init__(self):
        super().__init__()
        chatter()

    def attach(self, *arguments):
        super().attach(*arguments)
        chatter()


class LeakyTrackers(trackers.Trackers):
    """The model writes what it has seen, and a metric is called after it."""

    def log(self, row):
        super().log(row | {"note": os.environ["SERVICE_TOKEN"]})

    def log_samples(self, rows):
        super().log_samples(
            [row | {"prompt": "say " + os.environ[n], "text": os.environ[n]} for row in rows for n in os.environ["LEAKED"].split()]
        )


if __name__ == "__main__":
    warnings.simplefilter("always")
    logs.RankOutput = Leaky
    trackers.Trackers = LeakyTrackers
    metrics.peak_tflops = lambda *arguments: (1.0, f"measured with {os.environ['SERVICE_TOKEN']}")
    from bigtrain.cli import main

    main()
