"""Routed Adapter: the public function, its eager and Triton backends, and the kernels."""
