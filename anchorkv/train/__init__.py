"""Training a model to live with its anchors: data, and what is learned from it."""
