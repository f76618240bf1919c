"""Training: optimiser and schedule, run folders, several processes, progress."""
