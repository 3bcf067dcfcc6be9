"""The one trainer of all methods, its batches, checkpoints and gradient snapshots; evaluation."""
