"""The embedded world: images, videos, questions, simulated models and an annotator whose truth is known."""
