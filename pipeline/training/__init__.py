"""The one training loop of all prompts, its batches, checkpoints and gradient snapshots; evaluation."""
