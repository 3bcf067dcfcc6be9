"""The affinity `gradient`: how much the gradients of two tasks with respect to a shared prompt agree.

Design choices:
- Affinity is the inner product of two tasks' gradients (Eq. 8 of the MmAP paper), averaged over snapshots
  of the training; a similarity of `pipeline.grouping.affinities` normalizes the gradients first.
- The mean over snapshots is unweighted: under `dot` those with large gradients, usually the early ones, weigh more.
- Each block of the gradient (a layer) has its own affinity, and the mean over blocks is unweighted too. Under `dot` it
  only scales the result; under `cosine` every layer then has the same weight, however large its gradients.
- The arithmetic is float64, one snapshot at a time, whatever dtype the gradients were stored in.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.affinities import get_similarity


def affinity_matrix(
    gradients: np.ndarray,
    similarity: str,
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
        similarity: name of a similarity in `pipeline.grouping.affinities`.
        tasks: T task names for error messages, which otherwise have the task's index.
        blocks: indices (of P) of each block, from `gradient_blocks`; None for the entire gradient as one block.

    Returns:
        (T, T) float64, exactly symmetric. The diagonal is the mean squared gradient norm under `dot` and the
        fraction of snapshots with a non-zero gradient (normally 1) under the cosines.

    Raises:
        UserError: gradients are not three-dimensional, hold no snapshot, task or parameter, or hold a NaN or
            an infinity; the number of names is not T; the similarity is unknown.
    """
    total: np.ndarray | float = 0.0
    count = 0
    for gram in _snapshot_grams(gradients, similarity, tasks, blocks):
        total, count = total + gram, count + 1
    return _symmetric(np.asarray(total) / count)


def snapshot_affinities(
    gradients: np.ndarray, similarity: str, blocks: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Return the affinities of each snapshot (S, T, T), whose mean is `affinity_matrix`; arguments and errors as of
    that."""
    return np.stack([_symmetric(gram) for gram in _snapshot_grams(gradients, similarity, None, blocks)])


def _symmetric(gram: np.ndarray) -> np.ndarray:
    symmetric: np.ndarray = (gram + gram.T) / 2  # BLAS may round (i, j) and (j, i) differently
    return symmetric


def _snapshot_grams(
    gradients: np.ndarray, similarity: str, tasks: Sequence[str] | None, blocks: Sequence[np.ndarray] | None
) -> Iterator[np.ndarray]:
    """Yield each snapshot's Gram matrix (T, T), averaged over blocks."""
    gradients = np.asarray(gradients)
    kind = get_similarity(similarity)
    if gradients.ndim != 3:
        raise UserError(f"gradients have shape {gradients.shape}, expected (snapshots, tasks, parameters)")
    num_snapshots, num_tasks, num_parameters = gradients.shape
    if num_snapshots == 0:
        raise UserError("there are no gradient snapshots; train the global prompt until it has taken one")
    if num_tasks == 0 or num_parameters == 0:
        raise UserError(f"gradients have shape {gradients.shape}: no task or no parameter")
    if tasks is not None and len(tasks) != num_tasks:
        raise UserError(f"{len(tasks)} task names for gradients of {num_tasks} tasks")
    for index, snapshot in enumerate(gradients):
        finite = np.isfinite(snapshot).all(axis=1)
        if not finite.all():
            task = int(np.argmin(finite))
            name = f"task {task}" if tasks is None else f"task {task} ({tasks[task]!r})"
            num_bad = int(np.count_nonzero(~np.isfinite(snapshot[task])))
            raise UserError(
                f"snapshot {index}, {name}: {num_bad} of {num_parameters} gradient values are not finite; train the "
                "global prompt again, with a lower training.learning_rate or clip.precision=float32"
            )
    rms = _parameter_rms(gradients) if kind.divides_by_rms else None
    block_indices = [slice(None)] if blocks is None else blocks
    for snapshot in gradients:
        snapshot = snapshot.astype(np.float64)  # (T, P)
        if rms is not None:
            snapshot = snapshot / rms
        gram = np.zeros((num_tasks, num_tasks))
        for indices in block_indices:
            block = kind.normalize(snapshot[:, indices])
            gram += block @ block.T
        yield gram / len(block_indices)


def _parameter_rms(gradients: np.ndarray) -> np.ndarray:
    """Return the root mean square (P,) of each parameter's gradients over snapshots and tasks; 1 where all are zero."""
    num_snapshots, num_tasks, _ = gradients.shape
    largest = np.abs(gradients).max(axis=(0, 1)).astype(np.float64)
    largest[largest == 0] = 1.0
    squares = np.zeros_like(largest)
    for snapshot in gradients:
        squares += np.square(snapshot / largest).sum(axis=0)  # relative, as in Cosine.normalize
    rms: np.ndarray = largest * np.sqrt(squares / (num_snapshots * num_tasks))
    rms[rms == 0] = 1.0
    return rms
