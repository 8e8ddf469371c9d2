"""For all tests: a run in the background (nohup, a shell's &) has SIGINT ignored and would hand that on to what it starts.

tests/interpreted needs a process of its own and is collected only when it is asked for: `python -m pytest tests/interpreted`.
"""

import signal
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)

INTERPRETED = Path(__file__).with_name("interpreted")


def pytest_ignore_collect(collection_path, config):
    asked = any(INTERPRETED in (path := Path(arg.split("::")[0]).absolute(), *path.parents) for arg in config.args)
    return True if collection_path == INTERPRETED and not asked else None
