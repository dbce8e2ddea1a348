"""Align multimodal language models with ranked human preferences."""

__version__ = "0.1.0"
