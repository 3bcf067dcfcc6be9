"""Lazy import of torch, on first use.

The modules of methods define config sections, and `--help` must not wait the seconds that importing torch takes:

    from pipeline.lazy_torch import F, Module, nn, torch

Type checkers see torch itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["F", "Module", "nn", "torch"]

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn import Module
else:
    from functools import cache
    from importlib import import_module

    class _Lazy:
        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            return getattr(import_module(self._name), attribute)

    torch, nn, F = _Lazy("torch"), _Lazy("torch.nn"), _Lazy("torch.nn.functional")

    @cache
    def _torch_module(cls):
        """Return the class as a subclass of torch.nn.Module."""
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return cls if issubclass(cls, nn.Module) else type(cls.__name__, (cls, nn.Module), names)

    class Module:
        """Base of classes that become subclasses of torch.nn.Module when their first object is created."""

        def __new__(cls, *args, **kwargs):
            return object.__new__(_torch_module(cls))
