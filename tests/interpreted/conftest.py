"""Kernels in Triton's interpreter: a process of its own, `python -m pytest tests/interpreted`.

TRITON_INTERPRET counts when a kernel is decorated, so it is set here, before anything imports Triton. An interpreted kernel
cannot be compiled in the same process; tests that compile or that want no Triton at all live in the other folders.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest
from hypothesis import register_random

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import proof
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

if not isinstance(tl.softmax, InterpretedFunction):
    pytest.exit("Triton was imported before TRITON_INTERPRET=1 was set: run `python -m pytest tests/interpreted` by itself")

from bigtrain_kernels import interpreter


class TorchRandom:
    """torch's generator as hypothesis knows random ones: it begins alike in every example, so that a failure can be had again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH = TorchRandom()  # hypothesis holds it weakly
register_random(TORCH)


@pytest.fixture(scope="session", autouse=True)
def repaired():
    """The interpreter with its bf16 repaired; the run ends here if the repair does not hold."""
    torch.set_num_threads(1)
    interpreter.install()
    try:
        interpreter.verify()
    except RuntimeError as error:
        pytest.exit(f"Triton's interpreter cannot be trusted: {error}", returncode=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def checked():
    """`interpreter.checked()` around the whole test: every launch is checked, fresh memory is poisoned."""
    with interpreter.checked() as launches:
        yield launches


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A real bias is in every draw of inputs: a test that finds one runs twice more, and fails if it is there again."""
    try:
        return (yield)
    except proof.Biased as first:
        arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
        for _ in range(2):  # the generator of random inputs goes on from where it is
            try:
                pyfuncitem.obj(**arguments)
            except proof.Biased as again:
                if first.found & again.found:
                    raise
        return True
