"""Trained prompts as a service over HTTP: several models on one CLIP, in batches, by Ray Serve."""
