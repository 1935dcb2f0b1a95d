"""Convolution, BatchNorm, addition and activation as fewer operations; ours or PyTorch's, whichever is faster."""
