"""Inference with a trained adapter: a model object, an MLflow model, and batch prediction with Ray Data."""
