"""Measures of speed, side by side: a recipe's pipeline, its training step, and their peers."""
