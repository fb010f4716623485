"""What the user sees of a run: console, files, TensorBoard, the experts."""
