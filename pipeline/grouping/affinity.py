"""How much two tasks pull a shared prompt in the same direction.

What this module chose:
- Affinity is the inner product of two tasks' gradients (Eq. 8 of the MmAP paper), averaged over snapshots
  of the training; `pipeline.grouping.affinities` says how gradients are scaled before.
- Snapshots are averaged plainly: under `dot` those with large gradients, usually the early ones, weigh more.
- Blocks of the gradient (layers) have affinities of their own, which are averaged plainly too. Under `dot` that only
  scales the whole; under `cosine` every layer then counts alike, however long its gradients.
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
    """Mean over snapshots and blocks of the task x task Gram matrix of the gradients (Eq. 8 of the MmAP paper).

    A gradient that is exactly zero has no direction: under `cosine` all its cosines in that snapshot are 0,
    its diagonal entry included, and the snapshot still counts in the mean.

    Args:
        gradients: (S, T, P), for every snapshot the gradient of each task's loss with respect to the shared
            prompt, flattened; any real dtype.
        kind: a name of `pipeline.grouping.affinities`.
        tasks: T task names for error messages; without them messages give the task's index.
        blocks: indices (of P) of each block, as of `gradient_blocks`; None for the whole gradient as one.

    Returns:
        (T, T) float64, exactly symmetric. The diagonal is the mean squared gradient norm under `dot` and the
        share of snapshots with a non-zero gradient (normally 1) under `cosine`.

    Raises:
        UserError: gradients are not three-dimensional, hold no snapshot, task or parameter, or hold a NaN or
            an infinity; the number of names is not T; the kind is unknown.
    """
    gradients = np.asarray(gradients)
    scaled = get_affinity(kind).scaled
    if gradients.ndim != 3:
        raise UserError(f"gradients have shape {gradients.shape}, expected (snapshots, tasks, parameters)")
    num_snapshots, num_tasks, num_parameters = gradients.shape
    if num_snapshots == 0:
        raise UserError("there are no gradient snapshots; train the shared prompt until it has taken one")
    if num_tasks == 0 or num_parameters == 0:
        raise UserError(f"gradients have shape {gradients.shape}: no task or no parameter")
    if tasks is not None and len(tasks) != num_tasks:
        raise UserError(f"{len(tasks)} task names for gradients of {num_tasks} tasks")

    parts = [slice(None)] if blocks is None else blocks
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
        for part in parts:
            block = scaled(snapshot[:, part])
            gram += block @ block.T
    gram /= num_snapshots * len(parts)
    return (gram + gram.T) / 2  # BLAS may round (i, j) and (j, i) differently
