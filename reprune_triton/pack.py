"""Slices of many tensors gathered in one launch, and their gradients scattered in one: `narrow.gather` for a network.

For CUDA. Elsewhere, and wherever something is in the way, `Pack.gather` says no, and the caller goes tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import availability

if TYPE_CHECKING:
    from reprune_triton.kernels.pack import Copies

Cut = Sequence[tuple[int, Tensor]]  # (dimension, indices)
_ALIGNMENT = 256  # bytes, of every tensor in a buffer
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Form = tuple[int, torch.dtype | None, tuple[int, ...]]  # a tensor's address, dtype and strides


class Room(NamedTuple):
    """Where a tensor stands in a buffer."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype | None  # None: nothing but room
    offset: int  # bytes


class Pack:
    """The same slices of the same tensors, again and again.

    Args:
        cuts: for each tensor which indices are taken of which dimensions: int64, sorted. A vector has dimension 0 only.
        impl: "triton": the kernels, also interpreted; "torch": never; "auto": the kernels on CUDA.
    """

    def __init__(self, cuts: Sequence[Cut], impl: str = "auto"):
        self.cuts, self.impl = cuts, impl
        self._form: tuple[list[_Form], tuple[torch.dtype, ...]] | None = None
        self._copies: dict[Any, Copies] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has index lists of its own, and tables that point to them
        return Pack, (self.cuts, self.impl)

    def gather(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...] | None:
        """The slices, in these types and in the tensors' memory formats, side by side in one buffer. None: not here.

        Differentiable, once; the gradients are zero outside of the slices, and in the tensors' types. They all come
        in the end of a backward; under torch.distributed group after group, so that what is done is on its way.
        """
        if not tensors or not self._possible(tensors) or not self._prepare(tensors, tuple(dtypes)):
            return None
        with torch.no_grad():
            narrow = self._to_narrow()
        parts = (_Gather.apply(self, group, narrow[group.some], *tensors[group.some]) for group in self._groups)
        return tuple(slice for part in parts for slice in part)

    def put_back(self, gathered: Sequence[Tensor], targets: Sequence[tuple[int, Tensor, bool]]) -> None:
        """Write slices that `gather` has returned to where they come from; or zeros there.

        targets: (number of the slice, a tensor of the shape it was taken of, such as `takes` has nothing against,
            whether zeros).
        """
        if targets:
            tensors = [tensor for _, tensor, _ in targets]
            copies = self._back(tuple((number, zeros) for number, _, zeros in targets))
            copies.run([_form(tensor) for tensor in tensors], _buffer(gathered[0]))
            torch.autograd.graph.increment_version(tensors)

    def takes(self, tensor: Tensor) -> bool:
        """Whether `put_back` can write to this tensor."""
        return tensor.device == self._device and tensor.dtype in _DTYPES

    # ------------------------------------------------------------------ one launch each

    def _possible(self, tensors: Sequence[Tensor]) -> bool:
        if self.impl == "torch" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if torch._C._len_torch_dispatch_stack():  # fake tensors, and whoever else wants to see all operations
            return False
        if any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_inference() for tensor in tensors):
            return False
        device = tensors[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a graph would replay with the tables of its capture
        if self.impl == "auto" and device.type != "cuda":
            return False
        why_not = availability.why_not(device)
        if why_not and self.impl == "triton":
            message = f'impl="triton" cannot gather slices: {why_not}. Use impl="auto" or "reference".'
            raise availability.refusal(message, device)
        return why_not is None

    def _prepare(self, tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> bool:
        """Make what depends on the tensors, if they are not those of the last time; False if they cannot be packed."""
        form = [_form(tensor) for tensor in tensors], dtypes
        if form == self._form:
            return True
        device = tensors[0].device
        if not all(_fits(tensor, device) for tensor in tensors) or not set(dtypes) <= set(_DTYPES):
            return False
        self._form, self._device, self._copies = form, device, {}
        cuts = [{dim: index.to(device) for dim, index in cut} for cut in self.cuts]
        self._lists = [(cut.get(0), cut.get(1)) for cut in cuts]
        narrow = [
            tuple(len(cut.get(d, range(n))) for d, n in enumerate(t.shape))
            for t, cut in zip(tensors, cuts, strict=True)
        ]
        last = [_is_channels_last(t) for t in tensors]
        self._narrow, self._narrow_bytes = _rooms(narrow, last, dtypes)
        self._groups, begin, size = [], 0, 0
        for end, tensor in enumerate(tensors, 1):
            size += tensor.numel() * tensor.itemsize
            if size >= _group_bytes() or end == len(tensors):
                some = slice(begin, end)
                full = _rooms([tuple(t.shape) for t in tensors[some]], last[some], [t.dtype for t in tensors[some]])
                self._groups.append(_Group(some, *full))
                begin, size = end, 0
        return True

    def _to_narrow(self) -> tuple[Tensor, ...]:
        """The slices, from the tensors."""
        assert self._form is not None
        buffer = torch.empty(self._narrow_bytes, dtype=torch.uint8, device=self._device)
        copies = self._cached("gather", self._narrow, range(len(self._narrow)), "far", True)
        copies.run(self._form[0], buffer)
        return _views(buffer, self._narrow)

    def _to_full(self, group: _Group, narrow: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Tensors that are zero but for their slices; None where the slice is."""
        buffer = torch.zeros(group.bytes, dtype=torch.uint8, device=self._device)
        numbers = range(group.some.start, group.some.stop)
        copies = self._cached(("scatter", group.some.start), group.full, numbers, "near", True)
        absent = [(0, None, self._narrow[number].strides) for number in numbers]
        copies.run([a if t is None else _form(t) for a, t in zip(absent, narrow, strict=True)], buffer)
        full = _views(buffer, group.full)
        return [None if a is None else b for a, b in zip(narrow, full, strict=True)]

    def _back(self, targets: tuple[tuple[int, bool], ...]) -> Copies:
        """From the buffer to where its slices come from."""
        rooms = [self._narrow[i]._replace(dtype=None) if zeros else self._narrow[i] for i, zeros in targets]
        return self._cached(("back", targets), rooms, [number for number, _ in targets], "far", False)

    def _cached(self, key: Any, rooms: Sequence[Room], numbers: Sequence[int], full: str, to_buffer: bool) -> Copies:
        """Copies of the slices `numbers`, whose ends in the buffer are `rooms`."""
        if key not in self._copies:
            from reprune_triton.kernels.pack import Copies, Near

            shapes = [self._narrow[number].shape for number in numbers]
            near = [Near(shape, x.offset, x.dtype, x.strides) for shape, x in zip(shapes, rooms, strict=True)]
            lists = [self._lists[number] for number in numbers]
            self._copies[key] = Copies(near, lists, full, to_buffer, self._device)
        return self._copies[key]


class _Group(NamedTuple):
    """Tensors whose gradients come together."""

    some: slice  # their numbers
    full: list[Room]
    bytes: int


def _group_bytes() -> int:
    """From which size on a group is complete: as large as DistributedDataParallel's buckets, so that it can send one
    while the backward goes on."""
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return 25 << 20 if shared else 1 << 62


class _Gather(torch.autograd.Function):
    """From the tensors of a group to their slices, which are there already."""

    @staticmethod
    def forward(
        ctx: Any, pack: Pack, group: _Group, narrow: tuple[Tensor, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pack, ctx.group = pack, group
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x, t in zip(narrow, tensors, strict=True) if not t.requires_grad))
        return narrow

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, *ctx.pack._to_full(ctx.group, grads)


def _form(tensor: Tensor) -> _Form:
    return tensor.data_ptr(), tensor.dtype, tensor.stride()


def _fits(tensor: Tensor, device: torch.device) -> bool:
    whole = tensor.is_contiguous() or _is_channels_last(tensor)
    return whole and tensor.device == device and tensor.dtype in _DTYPES and tensor.dim() in (1, 2, 4)


def _is_channels_last(tensor: Tensor) -> bool:
    """And not contiguous in both ways, as a 1x1 kernel is."""
    return (
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _rooms(
    shapes: Sequence[tuple[int, ...]], channels_last: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> tuple[list[Room], int]:
    """Tensors side by side; and the bytes of all."""
    found, offset = [], 0
    for shape, last, dtype in zip(shapes, channels_last, dtypes, strict=True):
        format = torch.channels_last if last else torch.contiguous_format
        strides = torch.empty(shape, dtype=dtype, device="meta", memory_format=format).stride()
        found.append(Room(shape, strides, dtype, offset))
        offset += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return found, offset


def _views(buffer: Tensor, rooms: Sequence[Room]) -> tuple[Tensor, ...]:
    """Tensors in the buffer. With .data each has a version of its own: BatchNorm updates one while others are saved."""
    typed = {dtype: buffer.view(dtype) for dtype in {room.dtype for room in rooms} if dtype is not None}
    return tuple(
        typed[x.dtype].as_strided(x.shape, x.strides, x.offset // x.dtype.itemsize).data
        for x in rooms
        if x.dtype is not None
    )


def _buffer(view: Tensor) -> Tensor:
    """What `_views` has cut this tensor from."""
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())
