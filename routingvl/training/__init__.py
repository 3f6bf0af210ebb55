"""Training runs: the loop, its schedule, log and run folder, resuming, devices and precision, torch.compile."""
