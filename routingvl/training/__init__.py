"""Training runs: the loop, its schedule, its folder, precision, compilation."""
