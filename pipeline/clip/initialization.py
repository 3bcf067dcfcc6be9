"""Building of models without initial values, which take most of the time: on torch's meta device, whose tensors have
none, and where weights are loaded afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RANDOM_INITIALIZERS = {"normal_", "uniform_", "erfinv_", "kaiming_uniform_"}
"""torch.nn.init's other random functions call these."""
_INITIALIZERS = {
    *_RANDOM_INITIALIZERS,
    *("mul_", "add_", "clamp_", "fill_", "zero_", "copy_", "constant_", "triu_"),
}
"""In-place functions, of tensors and of torch.nn.init, that change values only."""
_RANDOM = {torch.rand, torch.randn}
"""On the meta device, these and products import torch._dynamo and sympy, which takes a second."""


class SkipInitialization(TorchFunctionMode):
    """Context in which tensors on the meta device are not initialized; on others, if `random` is set, not with random
    values: for weights that are loaded next."""

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        self._random = random

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if self._random and isinstance(tensor, Tensor) and name in _RANDOM_INITIALIZERS:
            return tensor
        if isinstance(tensor, Tensor) and tensor.is_meta:
            is_scaled = name == "mul" and tensor.is_floating_point() and isinstance(args[1], float)
            if name in _INITIALIZERS or is_scaled:
                return tensor
        if func in _RANDOM and (empty := torch.empty(*args, **kwargs)).is_meta:
            return empty
        return func(*args, **kwargs)
