"""ProKeR (Bendou et al., CVPR 2025): kernel ridge regression of what CLIP's similarities lack to the labels.

Classes with equal names are regressed together, from the images of all tasks that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.config.fields import NonNegative
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.method import ClassNames, FitConfig, FittedMethod, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("proker")
class ProKeR(FittedMethod):
    title = "ProKeR"
    per_image = ("points", "coefficients")

    class Options(FitConfig):
        """ProKeR: kernel ridge regression on image features."""

        beta: NonNegative = 1.66
        """Sharpness of the kernel (the authors' for 8 shots)."""
        regularization: Annotated[float, Field(gt=0)] = 0.07
        """Regularization λ towards CLIP (the authors' for 8 shots)."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__(config, towers, class_names)
        options = config.section(ProKeR.Options)
        self.beta, self.regularization = options.beta, options.regularization
        self._towers = (towers,)  # in a tuple, so that it is not a submodule
        points, coefficients = (self.zeros(0, width) for width in (towers.embed_dim, self.num_classes))
        self.points = nn.Parameter(points, requires_grad=False)  # (N, E)
        self.coefficients = nn.Parameter(coefficients, requires_grad=False)  # (N, K), over CLIP's temperature

    def fit(
        self, features: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], text_features: Sequence[torch.Tensor]
    ) -> None:
        x = [F.normalize(views.mean(dim=1), dim=-1) for views in features]
        points = torch.cat(x)
        image_tasks = torch.cat([torch.full_like(task_labels, task) for task, task_labels in enumerate(labels)])
        residuals = points.new_zeros(len(points), self.num_classes)
        for task, (task_x, task_labels, z) in enumerate(zip(x, labels, text_features)):
            one_hot = F.one_hot(task_labels, len(z)).to(points.dtype)
            rows = (image_tasks == task).nonzero()
            residuals[rows, self.classes[task]] = one_hot - task_x @ F.normalize(z, dim=-1).T
        kernel = self._kernel(points, points)
        coefficients = torch.zeros_like(residuals)
        for tasks, classes in self._classes_by_tasks().items():
            rows = torch.isin(image_tasks, torch.tensor(tasks, device=image_tasks.device)).nonzero()
            # The mean view of an image stands for all of its views, as if they were equal.
            ridge = torch.eye(len(rows), device=points.device, dtype=points.dtype) / self.views
            system = kernel[rows, rows.T] / self.regularization + ridge
            coefficients[rows, classes] = torch.linalg.solve(system, residuals[rows, classes])
        (towers,) = self._towers
        self.points.data = points.to(self.points)
        self.coefficients.data = (towers.logit_scale.exp() * coefficients).to(self.coefficients)

    def logits(self, classes: list[int], x: torch.Tensor, z: torch.Tensor, clip_logits: torch.Tensor) -> torch.Tensor:
        """Return the sum of CLIP's logits and the regression over CLIP's temperature."""
        return clip_logits + self._kernel(x, self.points.to(x.dtype)) @ self.coefficients[:, classes].to(x.dtype)

    def _kernel(self, x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.beta * (x @ points.T - 1))

    def _classes_by_tasks(self) -> dict[tuple[int, ...], list[int]]:
        """Return the classes of each combination of tasks that have them."""
        classes_by_tasks: dict[tuple[int, ...], list[int]] = {}
        for index in range(self.num_classes):
            tasks = tuple(task for task, classes in enumerate(self.classes) if index in classes)
            classes_by_tasks.setdefault(tasks, []).append(index)
        return classes_by_tasks
