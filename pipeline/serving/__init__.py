"""Inference over HTTP with Ray Serve: several models on one CLIP, with dynamic batching."""
