"""Trace a decoder into a graph of ATen operations with a symbolic batch size.

Composite operations that have a rule stay whole (aten.linear, aten.group_norm, aten.glu, ...): the
trace happens before dispatch, on fake tensors; those without are taken apart. Only the batch size
is symbolic; parameters and buffers are inputs of the graph, closures' tensors are constants kept by
reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from fastsfvae.jacobian.plan.asked import NumberAsked
from fastsfvae.jacobian.plan.conditions import no_fused_transformers, no_log_of_failures
from fastsfvae.jacobian.plan.decompose import composites
from fastsfvae.jacobian.plan.fingerprint import modules_with_paths
from fastsfvae.jacobian.plan.known import KnownValues, WrittenConstant, value_asked_for
from fastsfvae.jacobian.plan.refuse import (
    failure,
    first_line,
    refuse_batch_statistics,
    refuse_custom_functions,
    refuse_or_warn_about_hooks,
)
from fastsfvae.jacobian.plan.restore import Effects, restored
from fastsfvae.jacobian.validate import LATENTS, check_output

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)


@dataclasses.dataclass
class Trace:
    """A traced decoder.

    Attributes:
        module: its graph's placeholders are the parameters and buffers, then z, then the tensors
            among the further arguments; its attributes are the constants.
        inputs: the placeholders in that order.
        paths: the module path that created a node, where one is known.
        accepts: tells whether the graph is right for a batch size.
        asked: whose values it is made for, among the parameters, the buffers and then the further
            arguments without a batch axis.
        effects: what the decoder did beside its result.
    """

    module: fx.GraphModule
    inputs: list[fx.Node]
    paths: dict[fx.Node, str]
    accepts: BatchSizes
    asked: list[int]
    effects: Effects


def trace(
    decoder: Callable[..., Any],
    names: list[str],
    tensors: list[Tensor],
    z: Tensor,
    extras: list[Tensor],
    batched: list[bool],
    rebuild: Callable[[list[Any]], tuple[tuple, dict[str, Any]]],
    lifted: int = 0,
    advice: str = "",
) -> Trace:
    """Trace `decoder(z, *args, **kwargs)`.

    Args:
        decoder: an nn.Module, or any callable (then `names` is empty).
        names: the dotted names of parameters and buffers.
        tensors: their values; only shape, strides, dtype, device and requires_grad are used.
        z: [B, m], used in the same way.
        extras: the tensors among the further arguments.
        batched: for each of them, whether its leading axis is the batch.
        rebuild: turns a list of such tensors into (args, kwargs).
        lifted: out of how many, the last ones, it takes numbers.
        advice: what the message of a decoder that fails adds.

    Raises:
        NumberAsked: the trace fails with symbols for those numbers.
        RuntimeError: control flow that depends on tensor values, or a decoder that PyTorch cannot
            run on these inputs.
    """
    # The caller may be inside torch.func.grad or no_grad: that is for the plan's runs.
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        given = decoder, names, tensors, z, extras, batched, rebuild, lifted, advice
        try:
            found = _trace(*given)
        except Exception as error:
            if not lifted:
                raise
            raise NumberAsked from error
        values = [node.meta.get("val") for node in found.module.graph.nodes]
        if lifted and any(map(free_unbacked_symbols, filter(torch.is_tensor, values))):
            # It is a size, which a plan must know.
            raise NumberAsked
        return found


def _trace(decoder: Callable[..., Any], *given: Any) -> Trace:
    if isinstance(decoder, nn.Module):
        refuse_or_warn_about_hooks(decoder)
    traced: Callable[..., Trace] = functools.partial(_traced, decoder, *given)
    try:
        return traced(with_values=False)
    except _DATA_DEPENDENT:
        pass
    try:
        # Perhaps the value of a buffer or of a constant.
        return _traced_with_values(traced)
    except _DATA_DEPENDENT:
        # Perhaps of what the size of the batch tells: then the plan is for this one.
        return _traced_with_values(traced, any_batch=False)


def _traced_with_values(traced: Callable[..., Trace], any_batch: bool = True) -> Trace:
    try:
        return traced(with_values=True, any_batch=any_batch)
    except WrittenConstant:
        # Perhaps what was made of numbers alone, as zeros are, to be written into.
        return traced(with_values=True, any_batch=any_batch, made=False)


def _traced(
    decoder,
    names,
    tensors,
    z,
    extras,
    batched,
    rebuild,
    lifted,
    advice,
    with_values,
    any_batch=True,
    made=True,
) -> Trace:
    # What needs a value to go on is an error where it happens.
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)

    def symbolic(tensor: Tensor) -> Tensor:
        # Not the tensor itself: it may belong to a transform or to a graph.
        stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return mode.from_tensor(stand_in, symbolic_context=_batch_symbol(tensor, any_batch))

    def static(tensor: Tensor, known: bool = with_values) -> Tensor:
        if known:
            # A copy: what the decoder writes into must not be the user's.
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        with mode:
            return torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=tensor.dtype,
                device=tensor.device,
                requires_grad=tensor.requires_grad,
            )

    stand_ins = [static(t) for t in tensors]
    # Modules take shortcuts without a usable derivative where nothing requires a gradient.
    fake_z = symbolic(z).requires_grad_()
    first = len(extras) - lifted
    pairs = zip(extras[:first], batched, strict=False)
    fake_extras = [symbolic(t) if along else static(t) for t, along in pairs]
    fixed = [t for t, along in zip(fake_extras, batched, strict=False) if not along]
    fake_extras += [static(t, known=False) for t in extras[first:]]
    known = KnownValues(mode, [*stand_ins, *fixed], made)

    def call(params: list[Tensor], z: Tensor, extras: list[Tensor]) -> Any:
        # Numbers among the inputs come as 0-d tensors, and may be taken out of these alone.
        mode.allow_scalar_outputs = True
        with shapes.ignore_fresh_unbacked_symbols():
            args, kwargs = rebuild(extras)
        mode.allow_scalar_outputs = False
        with known if with_values else mode:
            if names and isinstance(decoder, nn.Module):
                swapped = dict(zip(names, params, strict=True))
                output = torch.func.functional_call(decoder, swapped, (z, *args), kwargs)
            else:
                output = decoder(z, *args, **kwargs)
        check_output(output, z)
        refuse_custom_functions(output)
        return output

    places = _Places(decoder)
    options: dict[str, Any] = {
        "tracing_mode": "real",
        "pre_dispatch": True,
        "_allow_non_fake_inputs": True,
        "_error_on_data_dependent_ops": not with_values,
    }
    try:
        surroundings = places.recorded(), no_log_of_failures(), no_fused_transformers()
        with contextlib.ExitStack() as stack, restored(decoder) as effects:
            for surrounding in surroundings:
                stack.enter_context(surrounding)
            module = make_fx(call, composites(), **options)(stand_ins, fake_z, fake_extras)
    except _DATA_DEPENDENT as error:
        if any_batch:
            raise
        raise RuntimeError(value_asked_for(error, places.current)) from error
    except UnsupportedOperatorException as error:
        raise RuntimeError(
            f"the decoder uses {first_line(error)}, which cannot be traced: PyTorch does not know "
            "the shape of its result"
        ) from error
    except Exception as error:
        if not _raised_by_torch(error):
            raise
        where = fake_z.shape[0], places.current, places.nodes, len(names)
        said = failure(error, rebuild(extras)[1].get(LATENTS, z), *where)
        raise RuntimeError(said + advice) from error
    _refuse_escaped_values(module)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    z_size = inputs[len(names)].meta["val"].shape[0]
    accepts = _batch_sizes(shapes, z_size, z.shape[0])
    return Trace(module, inputs, places.paths, accepts, sorted(known.asked), effects)


def _refuse_escaped_values(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, node.target), FakeTensor):
            # A value that escaped the tracer would come back as a constant without data.
            raise RuntimeError(
                "the decoder takes a value past the tracer, as tensor.data does; use .detach()"
            )


def _batch_symbol(tensor: Tensor, any_batch: bool) -> StatelessSymbolicContext:
    # All batch axes share one symbol. A batch of one is traced as such.
    batch = DimDynamic.DUCK if any_batch and tensor.shape[0] > 1 else DimDynamic.STATIC
    return StatelessSymbolicContext(dynamic_sizes=[batch] + [DimDynamic.STATIC] * (tensor.ndim - 1))


class BatchSizes:
    """For which batch sizes a trace is right: called with one, it tells.

    Args:
        symbol: that stands for the batch size, None where it is fixed.
        conditions: on it, which the decoder's shapes led to.
        traced: the one that was traced.
    """

    def __init__(self, symbol: Any, conditions: list[Any], traced: int):
        self._symbol, self._conditions = symbol, conditions
        self._verdicts = {traced: True}

    def __call__(self, batch: int) -> bool:
        """Whether it is right for that many samples."""
        if self._symbol is None:
            return self._verdicts.get(batch, False)
        if batch not in self._verdicts:
            # A symbol stands for two or more.
            self._verdicts[batch] = batch > 1 and self._holds(batch)
        return self._verdicts[batch]

    def allow_one(self) -> None:
        """Take it for a sample alone as well, which was tried."""
        if self._symbol is not None and self._holds(1):
            self._verdicts[1] = True

    def _holds(self, batch: int) -> bool:
        return all(bool(c.subs(self._symbol, batch)) for c in self._conditions)


def _batch_sizes(shapes: ShapeEnv, size: Any, traced: int) -> BatchSizes:
    if isinstance(size, int) or size.node.expr.is_number or shapes.replacements:
        return BatchSizes(None, [], traced)
    return BatchSizes(size.node.expr, [guard.expr for guard in shapes.guards], traced)


class _Places:
    """Which submodule creates each node of a trace, for error messages and reports.

    Args:
        decoder: the traced one.
    """

    def __init__(self, decoder: Callable[..., Any]):
        self.paths: dict[fx.Node, str] = {}
        self._names: dict[nn.Module, str] = {}
        if isinstance(decoder, nn.Module):
            self._names = {module: path for path, module in modules_with_paths(decoder)}
        # Of the modules that run: their paths and the newest nodes before them.
        self._running: list[tuple[str, fx.Node | None]] = []

    @property
    def current(self) -> str:
        """The path of the innermost module that runs, or that failed."""
        return self._running[-1][0] if self._running else ""

    @property
    def nodes(self) -> list[fx.Node]:
        """All of the graph, where a module runs or has failed."""
        starts = [start for _, start in self._running if start is not None]
        return list(starts[-1].graph.nodes) if starts else []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """While the decoder runs.

        Raises:
            RuntimeError: a submodule that runs on batch statistics.
        """
        # The hooks see every module of the process, those that other threads run as well.
        own = threading.get_ident()

        def enter(module: nn.Module, inputs: Any) -> None:
            if threading.get_ident() == own:
                path = self._names.get(module, "")
                refuse_batch_statistics(module, path)
                self._running.append((path, next(_newest_first(), None)))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() != own:
                return
            path, start = self._running.pop()
            for node in _newest_first():
                if node is start:
                    break
                # The innermost module leaves first.
                self.paths.setdefault(node, path)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _newest_first() -> Iterator[fx.Node]:
    mode = get_proxy_mode()
    return iter(()) if mode is None else iter(reversed(mode.tracer.graph.nodes))


def _raised_by_torch(error: BaseException) -> bool:
    """Whether an operation refused its inputs, and not the decoder or this library."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "torch"
