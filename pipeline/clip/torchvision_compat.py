"""Lets open_clip import where a CUDA build of torchvision stands beside a CPU build of torch.

Such a torchvision fails on import because the operators of its C++ library are missing. open_clip and timm use only
its Python parts, so it is enough to declare the missing operators. Where torchvision imports, this does nothing.
"""

from __future__ import annotations

import re
import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a library that is collected takes its operators along


def ensure_torchvision() -> None:
    """Imports torchvision, or declares its missing operators so that its Python parts import. Call it before
    `import open_clip`."""
    while True:
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or missing.group(1) not in _SCHEMAS:
                raise
            for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
                del sys.modules[module]
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(_SCHEMAS[missing.group(1)])
            _declared.append(library)
