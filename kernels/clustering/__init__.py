"""The kernels of a pruning event, and their launches."""
