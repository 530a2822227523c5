"""Image sources, and the pipeline from them to batches of views."""
