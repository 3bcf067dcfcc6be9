"""The affinity `transfer`: what two tasks gain from prompts that were trained on the other one alone.

The gain of task j from task i is the mean zero-shot loss over the training images of j minus their mean loss under
the prompts of i. Losses are cross-entropies in nats, on images as in a test, without augmentation. Gains of a pair are
averaged over both directions. A gain of zero is that of prompts without effect, so the objective `sum` joins exactly
the tasks that help each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError


@dataclass(frozen=True)
class TransferLosses:
    """Losses of all tasks' training images; N_j images of task j, of T tasks."""

    zero_shot: Sequence[np.ndarray]
    """For each task its images' losses (N_j,) under zero-shot CLIP."""
    adapted: Sequence[np.ndarray]
    """For each task its images' losses (T, N_j) under the prompts of every task."""

    @staticmethod
    def from_mappings(
        tasks: Sequence[str], zero_shot: Mapping[str, np.ndarray], adapted: Mapping[tuple[str, str], np.ndarray]
    ) -> TransferLosses:
        """Return the losses in the order of the tasks.

        Args:
            zero_shot: task → (N_j,).
            adapted: (task of the prompts, task of the images) → (N_j,).

        Raises:
            UserError: a loss is not finite.
        """
        for task, losses in zero_shot.items():
            if not np.isfinite(losses).all():
                raise UserError(
                    f"losses of task {task!r} under zero-shot CLIP are not finite: set clip.precision=float32, or "
                    "other weights with clip.pretrained"
                )
        for (trained_on, task), losses in adapted.items():
            if not np.isfinite(losses).all():
                raise UserError(
                    f"losses of task {task!r} under the prompts of {trained_on!r} are not finite: lower "
                    "training.learning_rate, or set clip.precision=float32"
                )
        return TransferLosses(
            [zero_shot[task] for task in tasks],
            [np.stack([adapted[trained_on, task] for trained_on in tasks]) for task in tasks],
        )

    @property
    def gains(self) -> np.ndarray:
        """Gains (T, T): of the column's task from the prompts of the row's; on the diagonal from its own."""
        return self._gains([slice(None)] * len(self.zero_shot))

    def resampled_affinity(self, rng: np.random.Generator) -> np.ndarray:
        """Return the affinities of a bootstrap resample of each task's images, the same under all prompts."""
        sizes = [len(losses) for losses in self.zero_shot]
        return transfer_affinity(self._gains([rng.integers(0, size, size) for size in sizes]))

    def _gains(self, selected: Sequence[np.ndarray | slice]) -> np.ndarray:
        columns = [
            zero_shot[images].mean() - adapted[:, images].mean(axis=1)
            for zero_shot, adapted, images in zip(self.zero_shot, self.adapted, selected, strict=True)
        ]
        return np.stack(columns, axis=1)


def transfer_affinity(gains: np.ndarray) -> np.ndarray:
    """Return the affinities (T, T) of gains (T, T): the mean of both directions."""
    affinity: np.ndarray = (gains + gains.T) / 2
    return affinity
