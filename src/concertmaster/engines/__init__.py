"""Inference engines, real and emulated, as the gateway talks to them."""
