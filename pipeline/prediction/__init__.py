"""Trained prompts in use: the model as an object, as an MLflow model, and on any number of images by Ray Data."""
