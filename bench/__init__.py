"""Benchmarks, to be read in this order.

problems.py         the workloads, and how wrong a result may be before it gets no time
peers.py            everything that the library can be replaced by, with one signature each
cases_*.py          what is timed: operations with given tensors; single layers; whole steps
measure.py, timing.py, memory.py    how one case is checked, timed, and its memory taken
suite.py, conftest.py, bench_*.py   `make bench`: pytest-benchmark over those cases
claims.py           `python -m bench.claims`: each claim of the README by one command
gpu/                `python -m bench.gpu`: all of it on a GPU, unattended, told on a page
ledger.py           results/ledger.csv, which only grows
choices.py          the library's table of faster layers, from the ledger
report.py           `python -m bench.report`: its tables and plots
compare.py          `python -m bench.compare A B`: two commits in one run
command.py          what the commands share
model.py            `python -m bench.model`: what to expect of a card, from counts alone
triton_calls.py     launches of Triton kernels as they are made
trace.py, kernel_counts.py  kernels in the profiler's trace; bytes and FLOPs of this library's
profile.py          `python -m bench.profile`: each named range's share of a step
"""
