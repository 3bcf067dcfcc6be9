"""CLIP-SVD (Koleilat et al., 2025): trains the singular values of the matrices in the layers of both towers; singular
vectors stay as they are.

These are the matrices of query, key, value, attention output and MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.lazy_torch import Module, nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("clip_svd")
class ClipSvd(Method):
    title = "CLIP-SVD"
    exports_weights = True
    trains_weights = True

    class Options(MethodConfig):
        """CLIP-SVD: the singular values of the layers' matrices in both towers."""

        training: TrainingOverrides = TrainingOverrides(
            epochs=100,
            batch_size=32,
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=0.01,
            warmup_epochs=0,
            min_learning_rate=1e-6,
            schedule_interval="step",
        )

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.towers = towers.trainable_copy()
        matrices = {
            f"{path}.{name}".replace(".", "/"): SingularValues(getattr(module, name), num_parts)  # torch forbids dots
            for path, module, name, num_parts in _matrices(self.towers)
        }
        self.matrices = nn.ModuleDict(matrices)

    @classmethod
    def needs_image_layers(cls) -> bool:
        return False

    def forward(self) -> Adaptation:
        for key, matrix in self.matrices.items():
            path, _, name = key.replace("/", ".").rpartition(".")
            setattr(self.towers.get_submodule(path), name, matrix())
        return Adaptation(towers=self.towers)


class SingularValues(Module):
    """A weight matrix of which only the singular values are trained: W + U diag(s - s⁰) Vᵀ, at first exactly W.

    Args:
        weight: `num_parts` matrices W of equal shape, one below the other.
    """

    weight: torch.Tensor
    u: torch.Tensor
    initial: torch.Tensor
    vt: torch.Tensor

    def __init__(self, weight: torch.Tensor, num_parts: int):
        super().__init__()
        parts = weight.detach().unflatten(0, (num_parts, -1))
        # In float64, so that vectors of close singular values are those of the training on another machine too.
        factors = torch.linalg.svd(parts.double(), full_matrices=False)
        u, initial, vt = (factor.to(weight.dtype) for factor in factors)
        self.values = nn.Parameter(initial.clone())  # s (parts, r)
        for name, value in {"weight": weight, "u": u, "initial": initial, "vt": vt}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self) -> torch.Tensor:
        change = (self.u * (self.values - self.initial)[:, None]) @ self.vt
        return self.weight + change.flatten(0, 1)


def _matrices(towers: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """Yield path and module of each matrix in a layer, its name in the module, and how many matrices it stacks."""
    for path, module in towers.named_modules():
        if not any(part.isdigit() for part in path.split(".")):
            continue  # in no layer, such as a projection to the features
        if isinstance(module, nn.MultiheadAttention):
            yield path, module, "in_proj_weight", 3
        elif isinstance(module, nn.Linear):
            yield path, module, "weight", 3 if path.endswith(".qkv") else 1
