"""A device that is not the CPU, for machines that have none: it finds tensors on the wrong side.

Tensors of the device ``NAME`` hold their numbers in CPU memory but say that they are elsewhere.
As on an accelerator, operations refuse to mix them with the CPU's, but for numbers (tensors
without dimensions), and only copies go between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"
"""torch's one device type that every build can name and none computes on."""

_CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class ForeignTensor(torch.Tensor):
    """A tensor of the device; ``numbers`` is what it stands for."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> ForeignTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=NAME,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _execute(func, args, kwargs or {})


def _execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; its results are where the operation would leave them."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    foreign = any(isinstance(x, ForeignTensor) for x in tensors)
    at_home = [x for x in tensors if not isinstance(x, ForeignTensor) and x.dim() > 0]
    if foreign and at_home and func not in _CROSSING:
        shapes = [tuple(x.shape) for x in at_home]
        raise RuntimeError(f"{func} got tensors of the device and, on the CPU, {shapes}")
    device = kwargs.get("device")
    if device is not None:
        foreign = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    return tree_map(_wrap, result) if foreign else result


def _unwrap(x: Any) -> Any:
    return x.numbers if isinstance(x, ForeignTensor) else x


def _wrap(x: Any) -> Any:
    return ForeignTensor(x) if isinstance(x, torch.Tensor) else x


class _Operations(TorchDispatchMode):
    """Catches what makes tensors from nothing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _execute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Handles the functions that look at a tensor's memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist:
            return func(_unwrap(args[0]))
        return func(*args, **kwargs)


@contextmanager
def foreign_device() -> Iterator[str]:
    """The device's name, while it is there.

    In inference mode torch hands over composite operations whole; without it, only simple ones.
    """
    with mock.patch("torch.inference_mode", torch.no_grad), _Operations(), _Functions():
        yield NAME
