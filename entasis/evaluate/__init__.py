"""Judging a trained model: bits per byte on held-out text, and generation."""
