"""Trainer of all methods, its batches, checkpoints and gradient snapshots; evaluation."""
