"""For all tests: a run in the background (nohup, a shell's &) has SIGINT ignored and would hand that on to what it starts."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
