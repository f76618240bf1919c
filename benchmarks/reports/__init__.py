"""What is done with results: files, tables, plots, comparisons, targets."""
