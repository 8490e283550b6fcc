"""How a model is run to score perturbed images: precision, compilation, chunks, and a copy made for speed."""
