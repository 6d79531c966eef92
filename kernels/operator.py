"""What all operators share: registration, choice of the implementation, and how exported programs choose.

An operator's file holds its contract (formula, shapes, errors), the plain PyTorch reference that defines it,
and one `Operator`. The function that users call checks its inputs and asks `Operator.choose`; it runs the
reference itself, and everything else through `torch.ops.tarvis.<name>`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op

from . import dispatch
from .dispatch import Impl

OPERATORS: dict[str, Operator] = {}
"""Every operator by name, in the order of registration."""


class Operator:
    """One operator `tarvis::<name>` with its implementations; a single node under torch.export.

    Where Triton compiles, torch.compile looks through the operator, so that Inductor plans the launches (and
    fuses the reference, where that runs). Where Triton is interpreted or missing, the operator is called as
    it is; an `opaque` one always is.

    Args:
        name: under `torch.ops.tarvis`.
        reference: plain PyTorch. Its parameters, and `impl: str` after them, are the schema.
        fake: takes the parameters of `reference` and returns empty results.
        triton: launches the kernels; imports Triton only when it is called, see `launcher`.
        cuda: runs the CUDA extension, if that has the operator.
        unfit: takes the parameters and says why no kernel can take them, or nothing.
        unfit_cuda: the same for what only the CUDA extension cannot take.
        save: what autograd keeps for `backward`, as `setup_context` of torch.library.register_autograd.
        backward: gradients of all parameters, as torch.library.register_autograd takes it.
        opaque: whether torch.compile must not look into the operator.
        tags: of an opaque operator.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        triton: Callable[..., Any],
        cuda: Callable[..., Any] | None = None,
        unfit: Callable[..., str],
        unfit_cuda: Callable[..., str] | None = None,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        opaque: bool = False,
        tags: Sequence[torch.Tag] = (),
    ) -> None:
        self.name = name
        self.no_cuda = "" if cuda is not None else dispatch.NOT_IN_CUDA
        self._unfit, self._unfit_cuda = unfit, unfit_cuda
        self._variants = {"reference": reference, "triton": triton, "cuda": cuda}
        signature = inspect.signature(reference, eval_str=True)
        impl = inspect.Parameter("impl", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
        registered = register(
            name,
            self._run,
            lambda *args: fake(*args[:-1]),
            signature.replace(parameters=[*signature.parameters.values(), impl]),
            opaque=opaque,
            tags=tags,
        )
        self.differentiable = backward is not None
        if backward is not None:
            registered.register_autograd(backward, setup_context=save)
        self.run = runner(name, save, backward)
        OPERATORS[name] = self

    def choose(self, impl: str, *args: Any, inside: bool = False) -> Impl:
        """The implementation for these arguments: see `dispatch.choose`."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        # sizes may be symbols while a program is exported; the machine that runs it will ask again
        unknown = torch.compiler.is_exporting() and not inside
        no_cuda = self.no_cuda
        if self._unfit_cuda is not None and not unknown:
            no_cuda = no_cuda or self._unfit_cuda(*args)
        return dispatch.choose(
            self.name,
            impl,
            tensors,
            unfit="" if unknown else self._unfit(*args),
            no_cuda=no_cuda,
            inside=inside,
            differentiable=self.differentiable,
        )

    def chosen(self, impl: str, *args: Any) -> Impl:
        """`impl` as the caller chose it; exported programs choose here, where they run or are compiled."""
        if impl == "auto" or torch.compiler.is_exporting():
            return self.choose(impl, *args, inside=True)
        return impl  # type: ignore[return-value]

    def _run(self, *args: Any) -> Any:
        *inputs, impl = args
        run = self._variants[self.chosen(impl, *inputs)]
        assert run is not None
        return run(*inputs)


def runner(
    name: str, save: Callable[..., None] | None = None, differentiate: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A function that runs a registered operator, within torch.func (grad, vmap) too.

    There the form in which torch.library registers operators is refused; vmap runs ours entry by entry.
    """
    run = getattr(torch.ops.tarvis, name)

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if save is not None:
                save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if differentiate is None:
                raise RuntimeError(f"tarvis::{name} has no derivative")
            return differentiate(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            def entry(i: int) -> Any:
                axes = zip(args, in_dims, strict=True)
                return Transformable.apply(*(x.select(d, i) if isinstance(d, int) else x for x, d in axes))

            outs = [entry(i) for i in range(info.batch_size)]
            if isinstance(outs[0], Tensor):
                return torch.stack(outs), 0
            stacked = tuple(torch.stack(parts) for parts in zip(*outs, strict=True))
            return stacked, (0,) * len(stacked)

    def call(*args: Any) -> Any:
        transformed = not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()
        return Transformable.apply(*args) if transformed else run(*args)

    return call


def launcher(path: str) -> Callable[..., Any]:
    """A function of `kernels._triton` ("mask_bits.forward"), whose module is imported by the first call."""
    module, function = path.split(".")

    def launch(*args: Any) -> Any:
        return getattr(import_module(f"._triton.{module}", __package__), function)(*args)

    return launch


def parts(most: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors by up to `most` entries of a batch, which is their first dimension."""
    (first, *_) = tensors
    assert first is not None
    if first.shape[0] <= most:
        yield tensors
        return
    for start in range(0, first.shape[0], most):
        yield tuple(None if x is None else x[start : start + most] for x in tensors)


def register(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    signature: inspect.Signature | None = None,
    *,
    opaque: bool = False,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Register `tarvis::<name>`, run on the GPU of its first tensor, and return its CustomOpDef.

    `signature` gives the schema where that of `body` does not.
    """

    def run(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # kernels are launched on the current GPU; no effect on a CPU
            return body(*args)

    run.__signature__ = signature or inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
    if opaque or not dispatch.HAS_TRITON or dispatch.INTERPRETED:
        operator: Any = custom_op(f"tarvis::{name}", run, mutates_args=(), tags=tags)
    else:
        # triton_op searches the source of what a function wraps for kernels, and imports the compiler to do
        # so, which takes a second. It would find none of ours; a partial has no source to search.
        run.__wrapped__ = partial(body)  # type: ignore[attr-defined]
        operator = triton_op(f"tarvis::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator


def differentiate(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` by autograd; None for inputs that are None or need no gradient."""
    with torch.enable_grad():
        leaves = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(inputs, needed, strict=True)
        ]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(function(*leaves), wanted, grad))
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]
