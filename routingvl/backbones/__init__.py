"""The frozen backbones: vision towers and language models, a table row per kind. Imports nothing of this library."""
