"""The kernels of a pruning event, and the sequence of their launches."""
