"""Slices of many tensors gathered in one launch, and their gradients scattered in one: `layers.gather` for a network.

This is for CUDA. Where it cannot be done, `Pack.gather` returns None, and the caller gathers tensor by tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from reprune_triton import availability, capture
from reprune_triton.errors import RepruneError

if TYPE_CHECKING:
    from reprune_triton.kernels.step.pack import Copies

Cut = Sequence[tuple[int, Tensor]]  # (dimension, indices)
_ALIGNMENT = 256  # bytes, of every tensor in a buffer
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = {Tensor, torch.nn.Parameter}
# Addresses, dtypes (None where there is no tensor) and strides of tensors.
_Forms = tuple[list[int], list[torch.dtype | None], list[tuple[int, ...]]]


class Room(NamedTuple):
    """The place of a tensor in a buffer."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype | None  # None: the tensor is not read, zeros stand for it
    offset: int  # bytes


class _Layout(NamedTuple):
    """Tensors side by side in a buffer, those of the same shape, strides and dtype next to each other."""

    rooms: list[Room]
    stacks: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]  # dtype, shape, strides, first element
    places: list[int]  # the index of each room among the tensors of all stacks, one stack after the other
    bytes: int


class _Look:
    """Tensors as they were seen last: addresses, dtypes, strides, and all else that `finds` compares."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.forms: _Forms = [t.data_ptr() for t in tensors], [t.dtype for t in tensors], [t.stride() for t in tensors]
        once = _once(tensors)
        sizes: list[Any] = [list(t.shape) for t in once]
        strides: list[Any] = [list(t.stride()) for t in once]
        self._guards = TensorGuards(*once, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._count = len(once)

    def finds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors at the same addresses, also in shape, class, device and requires_grad.

        It may be False for the same tensors in another mode, as under autocast. The guards are those of torch.compile,
        which compare all tensors in one call.
        """
        once = tensors if self._count == len(tensors) else _once(tensors)
        same = len(once) == self._count and self._guards.check(*once)
        return same and self.forms[0] == list(map(Tensor.data_ptr, tensors))


def _once(tensors: Sequence[Tensor]) -> Collection[Tensor]:
    """Return each of them once: guards refuse one that comes twice."""
    return {id(t): t for t in tensors}.values()


class Pack:
    """Gathers the same slices of the same tensors, again and again.

    A CUDA graph can hold all of it, once the same has been done without one. The tables that a replay reads are kept as
    long as this pack.

    Args:
        cuts: for each tensor the dimensions that are cut (0 or 1) and the indices that stay: int64, sorted.
        impl: "triton": the kernels, also interpreted; "torch": never the kernels; "auto": the kernels on CUDA.
    """

    def __init__(self, cuts: Sequence[Cut], impl: str = "auto"):
        self.cuts, self.impl = cuts, impl
        self._look: _Look | None = None
        self._wanted: tuple[list[torch.dtype], list[bool]] = [], []  # dtypes of slices, requires_grad of tensors
        self._far: dict[Any, _Look] = {}
        self._copies: dict[Any, Copies] = {}
        self._captured: list[Copies] = []  # those that graphs may replay

    def __reduce__(self) -> tuple[Any, ...]:  # the tables point to the index lists, and a copy has lists of its own
        return Pack, (self.cuts, self.impl)

    def gather(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...] | None:
        """Return the slices, side by side in one buffer; None where the kernels cannot do it.

        They are differentiable, once. The gradients have the shapes and types of the tensors, and are zero outside of
        the slices. They all come at the end of a backward; under torch.distributed group after group, so that the first
        can be sent while the backward goes on.

        Args:
            tensors: float32, bfloat16, float16 or float64; of 1, 2 or 4 dimensions, contiguous or channels_last.
            dtypes: of the slices, which keep the memory formats of the tensors.
        """
        if not self._prepare(tensors, list(dtypes)):
            return None
        found = _views(self._to_narrow(), self._narrow)
        for group in self._groups if torch.is_grad_enabled() else ():
            numbers = group.numbers
            slices = _Gather.apply(self, group, [found[i] for i in numbers], *[tensors[i] for i in numbers])
            for number, part in zip(numbers, slices, strict=True):
                found[number] = part
        return tuple(found)

    def hold(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return all slices, in the tensors' types, in a buffer for `put_back`; None where the kernels cannot do it."""
        if not self._prepare(tensors, [t.dtype for t in tensors]):
            return None
        return self._to_narrow()

    def put_back(self, slice: Tensor, targets: Sequence[tuple[int, Tensor, bool]]) -> None:
        """Write slices, or zeros, to the places from which the slices were gathered.

        Args:
            slice: any slice that `gather` has returned, or the buffer that `hold` has.
            targets: (number of the slice, tensor to write to, whether to write zeros). The tensor has the shape of the
                one that the slice is of, and `takes` accepts it.
        """
        if targets:
            numbers, tensors, zeros = zip(*targets, strict=True)
            key = "back", numbers, zeros
            slices = (self._narrow.rooms[number] for number in numbers)
            rooms = (x._replace(dtype=None) if zero else x for x, zero in zip(slices, zeros, strict=True))
            look = self._far.get(key)
            if look is None or not look.finds(tensors):
                look = self._far[key] = _Look(tensors)
            copies = self._cached(key, rooms, numbers, "far", False)
            self._copy(copies, look.forms, _buffer(slice))
            torch.autograd.graph.increment_version(tensors)

    def takes(self, tensor: Tensor) -> bool:
        """Whether `put_back` can write to this tensor."""
        return tensor.device == self._device and tensor.dtype in _DTYPES

    # ------------------------------------------------------------------ one launch each

    def _possible(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels can run on these tensors.

        Raises:
            RepruneError: if they cannot and impl is "triton".
        """
        if not _PLAIN.issuperset(map(type, tensors)) or any(map(Tensor.is_inference, tensors)):
            return False
        device = tensors[0].device
        if self.impl == "auto" and device.type != "cuda":
            return False
        why_not = availability.why_not(device)
        if why_not and self.impl == "triton":
            message = f'impl="triton" cannot gather slices: {why_not}. Use impl="auto" or "reference".'
            raise availability.refusal(message, device)
        return why_not is None

    def _prepare(self, tensors: Sequence[Tensor], dtypes: list[torch.dtype]) -> bool:
        """Make what depends on the tensors, unless they are those of the last time; False if they cannot be packed."""
        if not tensors or self.impl == "torch" or torch.compiler.is_compiling():
            return False
        # Fake tensors and others that want to see all operations are at work.
        if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
            return False
        before = self._look
        if before is not None and dtypes == self._wanted[0] and before.finds(tensors):
            return True
        if not self._possible(tensors):
            return False
        look, wanted = _Look(tensors), (dtypes, [tensor.requires_grad for tensor in tensors])
        if before is not None and wanted == self._wanted and look.forms == before.forms:
            self._look = look
            return True
        if capture.capturing():  # a capture copies no new tables to the device
            return False
        device = tensors[0].device
        if not all(_fits(tensor, device) for tensor in tensors) or not set(dtypes) <= set(_DTYPES):
            return False
        self._look, self._wanted, self._device, self._far, self._copies = look, wanted, device, {}, {}
        cuts = [{dim: index.to(device) for dim, index in cut} for cut in self.cuts]
        self._lists = [(cut.get(0), cut.get(1)) for cut in cuts]
        narrow = [
            tuple(len(cut.get(d, range(n))) for d, n in enumerate(t.shape))
            for t, cut in zip(tensors, cuts, strict=True)
        ]
        last = [not t.is_contiguous() for t in tensors]  # then it is channels_last, see `_fits`
        self._narrow = _layout(narrow, last, dtypes)
        self._groups, numbers, size = [], [], 0
        needing = [number for number, tensor in enumerate(tensors) if tensor.requires_grad]
        for number in needing:
            numbers.append(number)
            size += tensors[number].numel() * tensors[number].itemsize
            if size >= _group_bytes() or number == needing[-1]:
                own = [tensors[i] for i in numbers]
                full = _layout([tuple(t.shape) for t in own], [last[i] for i in numbers], [t.dtype for t in own])
                self._groups.append(_Group(numbers, full))
                numbers, size = [], 0
        return True

    def _to_narrow(self) -> Tensor:
        """Return a buffer with the slices of the tensors."""
        assert self._look is not None
        buffer = torch.empty(self._narrow.bytes, dtype=torch.uint8, device=self._device)
        rooms = self._narrow.rooms
        copies = self._cached("gather", rooms, range(len(rooms)), "far", True)
        self._copy(copies, self._look.forms, buffer)
        return buffer

    def _to_full(self, group: _Group, narrow: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return full tensors with these slices, zero elsewhere; None where the slice is None."""
        buffer = torch.zeros(group.full.bytes, dtype=torch.uint8, device=self._device)
        copies = self._cached(("scatter", group.numbers[0]), group.full.rooms, group.numbers, "near", True)
        strides = [
            self._narrow.rooms[number].strides if t is None else t.stride()
            for number, t in zip(group.numbers, narrow, strict=True)
        ]
        addresses = [0 if t is None else t.data_ptr() for t in narrow]
        self._copy(copies, (addresses, [None if t is None else t.dtype for t in narrow], strides), buffer)
        return [None if a is None else b for a, b in zip(narrow, _views(buffer, group.full), strict=True)]

    def _cached(self, key: Any, rooms: Iterable[Room], numbers: Sequence[int], full: str, to_buffer: bool) -> Copies:
        """Return the copies between the tensors and the buffer, of the slices `numbers` at `rooms` in the buffer."""
        capturing, found = capture.capturing(), self._copies.get(key)
        if found is None:
            from reprune_triton.kernels.step.pack import Copies, Near

            shapes = [self._narrow.rooms[number].shape for number in numbers]
            near = [Near(shape, x.offset, x.dtype, x.strides) for shape, x in zip(shapes, rooms, strict=True)]
            lists = [self._lists[number] for number in numbers]
            found = Copies(near, lists, full, to_buffer, self._device, capturing)
            if not capturing:  # what is captured gets its tables on the device only by a replay
                self._copies[key] = found
        if capturing and found not in self._captured:
            self._captured.append(found)
        return found

    @staticmethod
    def _copy(copies: Copies, far: _Forms, buffer: Tensor) -> None:
        """Launch the copies.

        Raises:
            RepruneError: if a CUDA graph is captured and the kernel is not loaded: a graph cannot hold that.
        """
        if not copies.run(far, buffer, capture.capturing()):
            raise RepruneError(
                "a CUDA graph of a narrow network is captured that has not done the same without one: do a whole "
                "training step first, on the stream of the capture (reprune_triton.capture.warm_up)"
            )


class _Group(NamedTuple):
    """Tensors whose gradients come together."""

    numbers: list[int]
    full: _Layout


def _group_bytes() -> int:
    """Return the size from which on a group is complete.

    It is that of DistributedDataParallel's buckets, so that it can send one while the backward goes on.
    """
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return 25 << 20 if shared else 1 << 62


class _Gather(torch.autograd.Function):
    """Connects slices that are gathered already to the tensors of their group, for autograd."""

    @staticmethod
    def forward(
        ctx: Any, pack: Pack, group: _Group, narrow: Sequence[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pack, ctx.group = pack, group
        ctx.set_materialize_grads(False)
        return tuple(narrow)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, *ctx.pack._to_full(ctx.group, grads)


def _fits(tensor: Tensor, device: torch.device) -> bool:
    """Whether the kernels can read this tensor."""
    plain = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return plain and tensor.device == device and tensor.dtype in _DTYPES and tensor.dim() in (1, 2, 4)


def _layout(
    shapes: Sequence[tuple[int, ...]], channels_last: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> _Layout:
    """Return places in a buffer for tensors of these shapes, memory formats and types."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (shape, last, dtype) in enumerate(zip(shapes, channels_last, dtypes, strict=True)):
        format = torch.channels_last if last else torch.contiguous_format
        strides = torch.empty(shape, dtype=dtype, device="meta", memory_format=format).stride()
        alike.setdefault((dtype, shape, strides), []).append(number)
    rooms: dict[int, Room] = {}
    stacks, offset = [], 0
    for (dtype, shape, strides), numbers in alike.items():
        each = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        rooms |= {number: Room(shape, strides, dtype, offset + i * each) for i, number in enumerate(numbers)}
        stack = (len(numbers), *shape), (each // dtype.itemsize, *strides)
        stacks.append((dtype, *stack, offset // dtype.itemsize))
        offset += len(numbers) * each
    places = {number: place for place, number in enumerate(itertools.chain(*alike.values()))}
    every = range(len(shapes))
    return _Layout([rooms[number] for number in every], stacks, [places[number] for number in every], offset)


def _views(buffer: Tensor, layout: _Layout) -> list[Tensor]:
    """Return the tensors of the buffer.

    Autograd does not take them for views of it: each has a version of its own, as BatchNorm updates some while others
    are saved for the backward.
    """
    found: list[Tensor] = []
    with torch._C._AutoDispatchBelowADInplaceOrView():
        for dtype, shape, strides, begin in layout.stacks:
            found += buffer.view(dtype).as_strided(shape, strides, begin).unbind()
    return [found[place] for place in layout.places]


def _buffer(view: Tensor) -> Tensor:
    """Return the buffer that holds this tensor."""
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())
