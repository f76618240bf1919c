"""What is measured: operators and heads on real shapes, ours and what people run instead."""
