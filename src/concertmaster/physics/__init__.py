"""How fast hardware runs a model: kernels, rate curves, continuous batching."""
