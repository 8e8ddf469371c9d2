"""Runs `bigtrain ...` as ranks that are forks of one process which has torch and DeepSpeed imported: a second, not ten.

Reads requests from its standard input, a JSON line each: {"ranks": [{"argv": [...], "environment": {...}, "output": PATH}]}.
Runs the ranks of a request at once and answers with a line, the list of their exit codes.
"""

import json
import os
import signal
import sys


def run(rank: dict) -> int:
    """Start one rank as a fork; gives its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(90)
        output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(source, descriptor)
        os.environ.update(rank["environment"])
        sys.argv = ["bigtrain", *rank["argv"]]
        from bigtrain.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import bigtrain.session
    import bigtrain.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes elsewhere
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pids = [run(rank) for rank in json.loads(line)["ranks"]]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), file=answers, flush=True)
