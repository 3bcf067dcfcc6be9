"""The affinity matrix: how much the gradients of two tasks with respect to a shared prompt agree.

Design choices:
- Affinity is the inner product of two tasks' gradients (Eq. 8 of the MmAP paper), averaged over snapshots
  of the training; `pipeline.grouping.affinities` normalizes the gradients first.
- The mean over snapshots is unweighted: under `dot` those with large gradients, usually the early ones, weigh more.
- Each block of the gradient (a layer) has its own affinity, and the mean over blocks is unweighted too. Under `dot` it
  only scales the result; under `cosine` every layer then has the same weight, however large its gradients.
- The arithmetic is float64, one snapshot at a time, whatever dtype the gradients were stored in.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.affinities import get_affinity


def affinity_matrix(
    gradients: np.ndarray,
    kind: str,
    *,
    tasks: Sequence[str] | None = None,
    blocks: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Return the (T, T) Gram matrix of the gradients, averaged over snapshots and blocks (Eq. 8 of the MmAP paper).

    A gradient that is exactly zero has no direction: under `cosine` all its cosines in that snapshot are 0,
    its diagonal entry included, and the snapshot still counts in the mean.

    Args:
        gradients: (S, T, P), for every snapshot the gradient of each task's loss with respect to the shared
            prompt, flattened; any real dtype.
        kind: a name in `pipeline.grouping.affinities`.
        tasks: T task names for error messages, which otherwise have the task's index.
        blocks: indices (of P) of each block, from `gradient_blocks`; None for the entire gradient as one block.

    Returns:
        (T, T) float64, exactly symmetric. The diagonal is the mean squared gradient norm under `dot` and the
        fraction of snapshots with a non-zero gradient (normally 1) under `cosine`.

    Raises:
        UserError: gradients are not three-dimensional, hold no snapshot, task or parameter, or hold a NaN or
            an infinity; the number of names is not T; the kind is unknown.
    """
    gradients = np.asarray(gradients)
    normalize = get_affinity(kind).normalize
    if gradients.ndim != 3:
        raise UserError(f"gradients have shape {gradients.shape}, expected (snapshots, tasks, parameters)")
    num_snapshots, num_tasks, num_parameters = gradients.shape
    if num_snapshots == 0:
        raise UserError("there are no gradient snapshots; train the global prompt until it has taken one")
    if num_tasks == 0 or num_parameters == 0:
        raise UserError(f"gradients have shape {gradients.shape}: no task or no parameter")
    if tasks is not None and len(tasks) != num_tasks:
        raise UserError(f"{len(tasks)} task names for gradients of {num_tasks} tasks")

    block_indices = [slice(None)] if blocks is None else blocks
    gram = np.zeros((num_tasks, num_tasks))
    for index, snapshot in enumerate(gradients):
        snapshot = snapshot.astype(np.float64)  # (T, P)
        finite = np.isfinite(snapshot).all(axis=1)
        if not finite.all():
            task = int(np.argmin(finite))
            name = f"task {task}" if tasks is None else f"task {task} ({tasks[task]!r})"
            num_bad = int(np.count_nonzero(~np.isfinite(snapshot[task])))
            raise UserError(
                f"snapshot {index}, {name}: {num_bad} of {num_parameters} gradient values are not finite; train the "
                "global prompt again, with a lower training.learning_rate or clip.precision=float32"
            )
        for indices in block_indices:
            block = normalize(snapshot[:, indices])
            gram += block @ block.T
    gram /= num_snapshots * len(block_indices)
    return (gram + gram.T) / 2  # BLAS may round (i, j) and (j, i) differently
