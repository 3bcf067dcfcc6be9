"""Files of a CLIP: where its architecture and weights are, and how they are read. No pickle is run."""
