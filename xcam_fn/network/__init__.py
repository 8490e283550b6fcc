"""A network as head ∘ trunk: what its forward runs, its halves, gradients at a layer, where tokens lie.

Nothing here depends on methods, class scores or heatmaps.
"""
