"""The table of layer kinds: a module that is cut by its row computes what the whole module computes."""

import pytest
import torch
from torch import nn

from reprune_triton.errors import RepruneError
from reprune_triton.running import layers
from reprune_triton.running.compact import compact
from reprune_triton.running.layers import Kind, Slice

KEEP = torch.tensor([0, 3, 4])  # of 6 channels
MODULES = {
    "BatchNorm2d": nn.BatchNorm2d(6),
    "without scale": nn.BatchNorm2d(6, affine=False),
    "InstanceNorm2d": nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "PReLU": nn.PReLU(6),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "conv": nn.Conv2d(6, 6, 3),
    "conv without bias": nn.Conv2d(6, 6, (1, 3), bias=False),
    "linear": nn.Linear(6, 6),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_row_is_true(name):
    module, x = MODULES[name].double(), torch.randn(2, 6, 5, 6, dtype=torch.float64)
    for tensor in (*module.parameters(), *(x for x in module.buffers() if x.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 1.5)
    kind = Kind.of(module)
    channels = 3 if name == "linear" else 1  # the dimension
    narrow = compact(nn.Sequential(module), {"0": Slice(KEEP, None if kind.follows else KEEP)})[0].train()
    mask = torch.zeros(6, dtype=torch.float64).index_fill_(0, KEEP, 1).view(6 if channels == 3 else (6, 1, 1))
    wanted = module.train()(x if kind.follows else x * mask).index_select(channels, KEEP)
    assert torch.allclose(narrow(x.index_select(channels, KEEP)), wanted)
    assert layers.width_read(module, kind) == 6 and layers.width_read(narrow, Kind.of(narrow)) == 3
    assert repr(narrow) == repr(module).replace("6", "3")
    for key, average in narrow.named_buffers():
        assert torch.allclose(average, module.get_buffer(key)[KEEP] if average.dim() else module.get_buffer(key))


def test_what_has_no_row_is_refused():
    with pytest.raises(RepruneError, match="a GroupNorm cannot run on part of its channels"):
        layers.cuts(nn.GroupNorm(2, 6), Slice(KEEP))
