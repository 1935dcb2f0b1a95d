"""Red zones around all that an interpreted kernel is given: what it stores beside a tensor fails the launch.

And less time to interpret it.
"""

import functools

import torch
from torch import Tensor
from triton.runtime import interpreter

BYTES = 16 << 10  # of a zone; what is stored beyond goes into memory of others
ZONE = torch.tensor([0xBB, 0x7F], dtype=torch.uint8).repeat(BYTES // 2)  # NaN as float32, float16 or bfloat16


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Guarded(interpreter.GridExecutor):
    """A launch on copies of the arguments, each between two red zones."""

    def __call__(self, *args_dev, **kwargs):
        _patched.clear()
        super().__call__(*args_dev, **kwargs)

    def _init_args_hst(self, args_dev, kwargs):
        self._copies: dict[int, tuple[str, Tensor, Tensor]] = {}  # of storages: name, own bytes, those with zones
        copies = [self._copy(name, x) for name, x in zip(self.arg_names, args_dev, strict=False)]
        return copies, {name: self._copy(name, x) for name, x in kwargs.items()}

    def _copy(self, name, x):
        if not isinstance(x, Tensor):
            return x
        own = _bytes(x.untyped_storage())
        if own.data_ptr() not in self._copies:  # views of one storage stay so
            self._copies[own.data_ptr()] = name, own, torch.cat([ZONE, own, ZONE])
        _, _, whole = self._copies[own.data_ptr()]
        offset = BYTES // x.element_size() + x.storage_offset()
        return torch.empty(0, dtype=x.dtype).set_(whole.untyped_storage(), offset, x.size(), x.stride())

    def _restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):
        for name, own, whole in self._copies.values():
            end = BYTES + len(own)
            for where, zone in (("in front of", whole[:BYTES]), ("behind", whole[end:])):
                if not torch.equal(zone, ZONE):
                    changed = int((zone != ZONE).sum())
                    raise AssertionError(
                        f"{self.fn.__name__} changed {changed} bytes {where} {name}, which has {len(own)} bytes"
                    )
            own.copy_(whole[BYTES:end])


_patch = interpreter._patch_lang
_patched: set[int] = set()  # the globals of functions for which the language is patched, in the launch that runs


def _patch_once(fn):
    """Make `tl` in this function the interpreter's.

    Triton does so again in every call of one kernel's function by another, which was a third of all the time.
    """
    if id(fn.__globals__) in _patched:
        return None
    _patched.add(id(fn.__globals__))
    return _patch(fn)


_slow = interpreter._get_np_dtype
_fast = functools.cache(_slow)


def _get_np_dtype(dtype):
    """The NumPy type of a Triton type, for which Triton makes a table of all of them each time: a tenth of the rest."""
    scalar = dtype.scalar
    return _slow(dtype) if scalar.is_ptr() else _fast(scalar)


def install() -> None:
    """From now on Triton's interpreter launches so."""
    interpreter.GridExecutor = Guarded
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _get_np_dtype
