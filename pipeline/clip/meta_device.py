"""Building of models on torch's meta device, whose tensors have shapes and no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_INITIALIZERS = {
    *("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_"),
    *("constant_", "kaiming_uniform_", "triu_"),
}
"""In-place functions, of tensors and of torch.nn.init, that change values only."""
_RANDOM = {torch.rand, torch.randn}
"""On the meta device, these and products import torch._dynamo and sympy, which takes a second."""


class SkipInitialization(TorchFunctionMode):
    """Context in which tensors on the meta device are not initialized, which takes most of the time to build a model
    there."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, Tensor) and tensor.is_meta:
            name = getattr(func, "__name__", "")
            is_scaled = name == "mul" and tensor.is_floating_point() and isinstance(args[1], float)
            if name in _INITIALIZERS or is_scaled:
                return tensor
        if func in _RANDOM and (empty := torch.empty(*args, **kwargs)).is_meta:
            return empty
        return func(*args, **kwargs)
