"""Import of open_clip with a CUDA build of torchvision next to a CPU build of torch.

Such a torchvision fails on import because the operators of its C++ library are missing. open_clip and timm use only
its Python parts, so declaring the missing operators is enough. If torchvision imports, nothing is changed.
"""

from __future__ import annotations

import re
import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a garbage-collected library removes its operators


def ensure_torchvision() -> None:
    """Import torchvision, and declare the operators it lacks. Call before `import open_clip`."""
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
