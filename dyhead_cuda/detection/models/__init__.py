"""Detectors: backbone and pyramid, Dynamic Head, predictors, and their published checkpoints."""
