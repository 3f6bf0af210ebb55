"""Routed bottlenecks as modules: layers, how the image reaches them, model surgery, files."""
