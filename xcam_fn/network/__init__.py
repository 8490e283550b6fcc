"""A network as head ∘ trunk: what its forward runs, its halves, gradients at a layer, where tokens lie.

Nothing here knows of methods, scores of classes, or heatmaps.
"""
