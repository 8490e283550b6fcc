"""Runs a model to score perturbed images: precision, compilation, chunks, and a faster copy."""
