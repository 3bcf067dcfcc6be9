"""The optimizers of torch without its compiler, whose import takes as long as that of torch itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from pipeline.config import TrainingConfig

Class = TypeVar("Class", bound=type[torch.optim.Optimizer])


def _uncompiled(optimizer: Class) -> Class:
    """Return a class of the same optimizer whose methods do not import torch.compile, which must not compile its steps.

    torch wraps them for its compiler: `step` to end what is compiled there, others to be called by it as they are.
    """
    for method in (optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict):
        original = inspect.unwrap(method)
        setattr(original, "__dynamo_disable", original)  # what torch calls, and else makes on the first call
    step = torch.no_grad()(inspect.unwrap(optimizer.step))
    return cast(Class, type(optimizer.__name__, (optimizer,), {"step": step}))


Adam = _uncompiled(torch.optim.Adam)
_SGD, _AdamW = _uncompiled(torch.optim.SGD), _uncompiled(torch.optim.AdamW)
OPTIMIZERS: Mapping[str, Callable[[Sequence[nn.Parameter], TrainingConfig], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, config: _SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    ),
    "adamw": lambda parameters, config: _AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay),
}
"""Optimizers by the value of `training.optimizer`."""
