"""Aggregations: how a step weighs several tasks, in place of the plain sum of their losses (Eq. 11).

After the one backward pass of a step, the method has each task's gradient of the P parameters that its T tasks share.
An aggregation gives the tasks weights w, and the shared parameters are updated by Σ w_t g_t. Weights of gradients
(TorchJD's aggregators) leave parameters that belong to one task to that task's own gradient; weights of losses multiply
it too.

All weights have the scale of the sum: where the tasks agree they are about one each, so that a learning rate that suits
the sum suits them. Aggregators whose weights sum to one are therefore multiplied by T.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.methods.method import Method
from pipeline.seeds import derive_seed
from pipeline.training.optimizers import Adam

EXTRA = "pip install 'mmap-clip[aggregation]'"


class Aggregation(nn.Module):
    """Weights of T tasks in each step; its parameters, if any, are trained with the method's."""

    weighs_losses: ClassVar[bool] = True
    """Whether a task's weight also multiplies its gradient of the parameters that belong to it alone."""

    def __init__(self, method: Method, num_tasks: int):
        super().__init__()
        self.num_tasks = num_tasks
        self.shared = method.shared_parameters()  # in lists, so that they are not parameters of this module
        is_shared = {id(parameter) for parameter in self.shared}
        self.task_parameters = [p for p in method.parameters() if p.requires_grad and id(p) not in is_shared]

    def weights(self, step: int, losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Return the tasks' weights (T,) in a step (from 0); arguments and result are float64 on the CPU.

        Args:
            losses: (T,).
            gradients: (T, P), of the shared parameters.

        Raises:
            UserError: there are none for these gradients.
        """
        raise NotImplementedError

    def update(
        self, optimizer: torch.optim.Optimizer, step: int, losses: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        """Update the parameters, which have the gradients of the summed losses; arguments and result as of `weights`,
        on any device."""
        weights = self.weights(step, losses.cpu().double(), gradients.cpu().double())
        row = weights.to(gradients)
        sizes = [parameter.numel() for parameter in self.shared]
        for parameter, gradient in zip(self.shared, (row @ gradients).split(sizes)):
            _gradient(parameter).copy_(gradient.view_as(parameter))
        if self.weighs_losses:
            for parameter in self.task_parameters:
                _gradient(parameter).mul_(row.view(-1, *[1] * (parameter.dim() - 1)))
        optimizer.step()
        return weights


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None  # a step depends on all parameters
    return parameter.grad


@dataclass(frozen=True)
class TorchJdAggregator:
    """An aggregator of TorchJD."""

    build: Callable[[Any, int], Any]
    """(torchjd.aggregation, T) → aggregator."""
    packages: tuple[str, ...] = ()
    """What it imports besides torchjd."""
    is_mean: bool = False
    """Whether its weights have the scale of the mean."""


TORCHJD: Mapping[str, TorchJdAggregator] = {
    "pcgrad": TorchJdAggregator(lambda library, num_tasks: library.PCGrad()),
    "cagrad": TorchJdAggregator(lambda library, num_tasks: library.CAGrad(c=0.5), ("cvxpy", "clarabel"), is_mean=True),
    "mgda": TorchJdAggregator(lambda library, num_tasks: library.MGDA(), is_mean=True),
    "upgrad": TorchJdAggregator(
        lambda library, num_tasks: library.UPGrad(torch.ones(num_tasks, dtype=torch.float64)),
        ("qpsolvers", "quadprog"),
    ),
    "nash_mtl": TorchJdAggregator(lambda library, num_tasks: library.NashMTL(num_tasks), ("cvxpy", "ecos")),
}


class GradientAggregation(Aggregation):
    """Weights by the tasks' gradients: PCGrad (Yu et al., NeurIPS 2020), CAGrad (Liu et al., NeurIPS 2021), MGDA (Sener
    and Koltun, NeurIPS 2018), UPGrad (Quinton and Rey, 2024), Nash-MTL (Navon et al., ICML 2022), all by TorchJD."""

    weighs_losses = False

    def __init__(self, name: str, method: Method, num_tasks: int, seed: int):
        super().__init__(method, num_tasks)
        import torchjd.aggregation  # optional

        self.name, self.seed = name, seed
        self._aggregator = TORCHJD[name].build(torchjd.aggregation, num_tasks)

    def weights(self, step: int, losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.default_generator.manual_seed(derive_seed(self.seed, "aggregation", str(step)))  # PCGrad's orders
            warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
            try:
                weights: torch.Tensor = self._aggregator.weighting(gradients)
                reason = "" if weights.isfinite().all() else f"weights are {weights.tolist()}"
            except Exception as error:  # of TorchJD or a solver
                reason = f"{type(error).__name__}: {error}"
        if reason:
            norms = ", ".join(f"{norm:.3g}" for norm in gradients.norm(dim=1).tolist())
            raise UserError(
                f"training.aggregation={self.name} found no weights of the tasks at step {step + 1}, where their "
                f"gradients have the norms {norms} ({reason}): lower training.learning_rate, or set "
                "--training.aggregation pcgrad or sum, which solve no optimization problem"
            )
        return weights * self.num_tasks if TORCHJD[self.name].is_mean else weights

    def get_extra_state(self) -> torch.Tensor | None:
        """Return the weights with which Nash-MTL starts its next search; None: the aggregator has no state."""
        return torch.from_numpy(self._aggregator.weighting.prvs_alpha) if self.name == "nash_mtl" else None

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None:
            self._aggregator.weighting.prvs_alpha = state.numpy().copy()


class Uncertainty(Aggregation):
    """Weights exp(-s_t) of the losses, with trained log variances s_t of the tasks (Kendall et al., CVPR 2018, Eq. 10):
    the loss is Σ exp(-s_t) L_t + s_t / 2."""

    def __init__(self, method: Method, num_tasks: int):
        super().__init__(method, num_tasks)
        self.log_variances = nn.Parameter(self.shared[0].new_zeros(num_tasks))

    def weights(self, step: int, losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        weights = (-self.log_variances.detach().cpu().double()).exp()
        self.log_variances.grad = (0.5 - weights * losses).to(self.log_variances)
        return weights


class Famo(Aggregation):
    """FAMO (Liu et al., NeurIPS 2023): all losses shall decrease at the same rate.

    The update is that of Σ z_t log L_t, normalized so that the weights of the losses sum to T; z is the softmax of
    logits, which decrease for tasks whose log L_t decreased more. How much an update decreases the log L_t of its batch
    is taken to first order, from the tasks' gradients; the authors run a second forward pass for it.
    """

    logits: torch.Tensor

    def __init__(self, method: Method, num_tasks: int):
        super().__init__(method, num_tasks)
        self.register_buffer("logits", torch.zeros(num_tasks, dtype=torch.float64))
        self._optimizer = Adam([self.logits], lr=0.025, weight_decay=0.01)  # the authors'

    def weights(self, step: int, losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        weights = self.logits.softmax(0) / (losses + 1e-8)
        return weights * self.num_tasks / weights.sum()

    def update(
        self, optimizer: torch.optim.Optimizer, step: int, losses: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        task_gradients = [_gradient(parameter).flatten(1).clone() for parameter in self.task_parameters]
        values = [parameter.detach().clone() for parameter in (*self.shared, *self.task_parameters)]
        weights = super().update(optimizer, step, losses, gradients)
        changes = [new.detach() - old for new, old in zip((*self.shared, *self.task_parameters), values)]
        shared_change = torch.cat([change.flatten() for change in changes[: len(self.shared)]])
        increases = gradients @ shared_change
        for gradient, change in zip(task_gradients, changes[len(self.shared) :]):
            increases = increases + (gradient * change.flatten(1)).sum(1)
        decreases = (-increases / (losses + 1e-8)).cpu().double()
        shares = self.logits.softmax(0)
        self.logits.grad = shares * (decreases - shares @ decreases)
        self._optimizer.step()
        return weights

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the logits' optimizer."""
        return self._optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


def make_aggregation(name: str, method: Method, num_tasks: int, seed: int) -> Aggregation | None:
    """Return the aggregation of a value of `training.aggregation`; None: the sum, also of a single task, which there is
    nothing to weigh against. Raises: UserError: as `check_packages`."""
    if name == "sum" or num_tasks == 1:
        return None
    check_packages(name)  # a worker's machine may differ from that of the job
    if name in TORCHJD:
        return GradientAggregation(name, method, num_tasks, seed)
    return {"uncertainty": Uncertainty, "famo": Famo}[name](method, num_tasks)


def check_packages(name: str) -> None:
    """Raises: UserError: a package that this value of `training.aggregation` needs is not installed."""
    packages = ("torchjd", *TORCHJD[name].packages) if name in TORCHJD else ()
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(
            f"training.aggregation={name} needs {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            f"installed; on all machines:\n{EXTRA}"
        )
