"""How a decoder runs while it is traced: nothing compiled, no torch.func, no foreign warnings."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._functorch import eager_transforms, vmap
from torch.autograd import forward_ad

from fastsfvae.jacobian.plan.fingerprint import modules_with_paths
from fastsfvae.jacobian.validate import layer_name, uncompiled

# Where torch.func's transforms begin, and what messages call them.
_ENTRIES: list[tuple[Any, str, str]] = [
    (vmap, "vmap_increment_nesting", "vmap"),
    (eager_transforms, "grad_increment_nesting", "grad, vjp or jacrev"),
    (eager_transforms, "jvp_increment_nesting", "jvp or jacfwd"),
    (forward_ad, "enter_dual_level", "forward mode"),
]


@contextlib.contextmanager
def uncompiled_parts(decoder: Callable[..., Any]) -> Iterator[None]:
    """Run what torch.compile made as it was before; undone by `restored`."""
    for module in decoder.modules() if isinstance(decoder, nn.Module) else ():
        module.__dict__.pop("_compiled_call_impl", None)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = uncompiled(child)
    # Compiled functions are beyond the tree. Nothing is compiled without this import, a slow one.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    config: Any = sys.modules["torch._dynamo.config"]
    with config.patch(error_on_nested_fx_trace=False):
        yield


@contextlib.contextmanager
def no_warnings_of_torch() -> Iterator[None]:
    """Keep to ourselves what PyTorch says to those who call it: that is this library."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|fastsfvae)(\.|$)")
        # PyTorch hides it by not showing it, which is no help where warnings are errors.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        # It is a trace that has them, for a moment.
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global")
        yield


@contextlib.contextmanager
def no_transforms(decoder: Callable[..., Any]) -> Iterator[None]:
    """Refuse torch.func inside the decoder, whose values a trace does not see.

    Raises:
        RuntimeError: names the module that calls it.
    """
    paths: dict[int, str] = {}
    if isinstance(decoder, nn.Module):
        paths = {id(module): path for path, module in modules_with_paths(decoder)}
    own = threading.get_ident()

    def refusing(name: str, enter: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any) -> Any:
            if threading.get_ident() != own:
                return enter(*args)
            raise RuntimeError(
                f"{layer_name(_running(paths))} uses torch.func ({name}), inside which a trace "
                "sees nothing: write the function for a whole batch in plain operations, or use "
                'backend="reference"'
            )

        return refuse

    before = [(module, name, getattr(module, name)) for module, name, _ in _ENTRIES]
    try:
        for (module, name, said), (*_, enter) in zip(_ENTRIES, before, strict=True):
            setattr(module, name, refusing(said, enter))
        yield
    finally:
        for place in before:
            setattr(*place)


def _running(paths: dict[int, str]) -> str:
    """The path of the innermost module whose method runs."""
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if id(owner) in paths and frame.f_code.co_name != "_call_impl":
            return paths[id(owner)]
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextlib.contextmanager
def no_log_of_failures() -> Iterator[None]:
    """Keep PyTorch from logging a traceback of what is raised, and said in one line, anyway."""
    logger, own = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != own or record.levelno < logging.ERROR

    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


@contextlib.contextmanager
def no_fused_transformers() -> Iterator[None]:
    """Keep nn.TransformerEncoder from asking for values to see whether it may run in one call."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
