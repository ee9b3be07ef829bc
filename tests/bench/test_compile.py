"""Kernels compiled ahead: what a launch would ask for, and no longer than there is time."""

import contextlib
import multiprocessing
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import triton
from triton.compiler import compiler
from triton.runtime import cache
from triton.runtime.jit import JITFunction

from bench import launches
from bench.gpu import compile as ahead
from bench.ledger import Recorder
from bench.measure import RUNNING, Context, OutOfTime
from fastsfvae.kernels import _record
from fastsfvae.kernels._launch import DeviceLimits
from tests._triton import INTERPRETER

pytestmark = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")


def key_of(source, target=None, options=None, _env_vars=None):
    backend = compiler.make_backend(target)
    options = backend.parse_options(dict(options or {}))
    environment = compiler.get_cache_invalidating_env_vars()
    return compiler.get_cache_key(source, backend, options, environment)


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_a_launch_looks_on_the_disk_for_what_was_compiled(monkeypatch, dtype):
    launched, by_jit, record = set(), JITFunction.run, _record.recorded
    # Else each key reads all of Triton.
    monkeypatch.setattr(cache, "triton_key", lambda: "triton")
    monkeypatch.setattr(triton.compiler, "compile", lambda *a, **k: launched.add(key_of(*a, **k)))

    def recorded(limits):
        with record(limits) as found:
            write = JITFunction.run

            def both(self, *args, grid, warmup, **kwargs):
                write(self, *args, grid=grid, warmup=warmup, **kwargs)
                # What this finds is of a card that is not there.
                with mock.patch.dict(self.device_caches, clear=True):
                    by_jit(self, *args, grid=grid, warmup=True, **kwargs)

            with mock.patch.object(JITFunction, "run", both):
                yield found

    monkeypatch.setattr(launches, "recorded", contextlib.contextmanager(recorded))
    found = launches.step("tiny", dtype, DeviceLimits(132, 90), 2).kernels
    monkeypatch.setattr(triton, "compile", key_of)
    assert len(launched) > 10 and {launch.compile(90) for launch in found} == launched


def test_launchers_are_built_where_each_kernel_has_its_own(monkeypatch):
    from triton.backends.nvidia import driver

    built, kernel = [], SimpleNamespace(src="source", metadata="metadata")
    monkeypatch.setattr(driver, "CudaLauncher", lambda *of: built.append(of))
    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    ahead.build_launcher(kernel)
    assert built == [("source", "metadata")]
    monkeypatch.delattr(driver, "make_launcher")
    ahead.build_launcher(kernel)
    assert len(built) == 1


def test_out_of_time_nobody_is_waited_for(tmp_path):
    started = time.monotonic()
    context = Context("cpu", True, Recorder(tmp_path / "rows.csv", "cpu", "x"), started + 0.5)
    context.goes_on = True
    with pytest.raises(OutOfTime):
        ahead.part(context)
    for worker in multiprocessing.active_children():
        worker.join(5)
    assert not multiprocessing.active_children() and not (tmp_path / RUNNING).exists()
