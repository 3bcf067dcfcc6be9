"""Imports of large libraries."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Import in the block without garbage collection.

    Imports create many objects and next to no garbage; looking for it again and again takes a fifth of their time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def deferred(*libraries: str) -> Iterator[None]:
    """Let modules that are first imported in the block import these libraries on first use, each as a whole.

    Those that are imported already, or not installed, are as always. A library in the block may take attributes of
    them, call them, and check instances of their classes, but not derive classes.
    """
    finder = _Finder({name for name in libraries if name not in sys.modules and find_spec(name)})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in tuple(finder.libraries):
            finder.release(name)


class _Finder(MetaPathFinder, Loader):
    """Finds placeholders for the modules of libraries."""

    def __init__(self, libraries: set[str]):
        self.libraries = libraries

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if any(f"{fullname}.".startswith(f"{name}.") for name in self.libraries):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredModule(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        """A placeholder has no code."""

    def release(self, library: str) -> None:
        """Let the library be imported as always from now on."""
        self.libraries.discard(library)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{library}.")]:
            if isinstance(sys.modules[name], _DeferredModule):
                del sys.modules[name]
        parent, _, child = library.rpartition(".")
        if parent and isinstance(vars(sys.modules[parent]).get(child), _DeferredModule):
            delattr(sys.modules[parent], child)


class _DeferredModule(ModuleType):
    """Placeholder of a module."""

    def __init__(self, name: str, finder: _Finder):
        super().__init__(name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _DeferredAttribute(self, name)


class _DeferredAttribute:
    """Placeholder of an attribute of a module, which is imported on first use."""

    def __init__(self, module: _DeferredModule, name: str):
        self._module, self._name = module, name

    def _get(self) -> Any:
        module, finder = self._module.__name__, self._module._finder
        for library in tuple(finder.libraries):
            if f"{module}.".startswith(f"{library}."):
                finder.release(library)
        return getattr(import_module(module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._get(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._get())
