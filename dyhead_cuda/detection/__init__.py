"""Detectors with a Dynamic Head on torchvision: models, data, training, evaluation, pictures."""
