"""Routed bottlenecks as modules: layers, how the image reaches them, putting them into a model, files."""
