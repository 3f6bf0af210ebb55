"""What the Triton kernels of LoRA and Adapter share: device code, tiles, and launching."""
