"""The kernels of a training step."""
