"""Pictures of detections, of learning curves and of what a trained head attends to."""
