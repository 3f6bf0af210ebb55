"""Programs that use the library; each says at its head how to run it."""
