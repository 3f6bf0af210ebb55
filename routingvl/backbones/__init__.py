"""The frozen backbones: vision towers and language models."""
