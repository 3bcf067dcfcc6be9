"""Execution and storage: Ray cluster and work items, artifacts, the run lock, progress, MLflow."""
