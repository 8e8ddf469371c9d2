"""The operators that a transformer spends its time in, behind one signature each (`ops`).

    ops.py        the operators that a model calls, and the one place that picks a backend
    fused.py      the torch backend: backward passes written by hand, fewer passes over memory than autograd's
    reference.py  the same mathematics in plain torch, to read and to test against

Imports torch only (and Triton, where kernels need it); usable without the rest of bigtrain.
"""
