"""Whether our Triton kernels can run on a device. All code that has kernels asks here."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from reprune_triton.errors import RepruneError

_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(device: torch.device) -> str | None:
    """Return why our kernels cannot run on this device; None if they can.

    This is tried once for each device: Triton is imported, and on a GPU a kernel of one line is compiled and loaded,
    for which Triton needs a driver and a C compiler. If Triton interprets kernels (TRITON_INTERPRET=1), any device
    will do.

    Warns:
        UserWarning: once, if Triton is there and fails on a GPU.
    """
    if torch.compiler.is_compiling():  # nothing can be tried now; torch.compile itself needs Triton
        return _at_a_glance(device)
    return _tried(device)[0]


def refusal(message: str, device: torch.device) -> RepruneError:
    """Return an error with this message; its cause is the error that `why_not` has met on this device, if any."""
    error = RepruneError(message)
    if not torch.compiler.is_compiling():
        error.__cause__ = _tried(device)[1]
    return error


def _at_a_glance(device: torch.device) -> str | None:
    if not _INSTALLED:
        return "Triton is not installed (it comes with torch on Linux; pip install triton)"
    from reprune_triton.kernels import probe

    return None if device.type == "cuda" or probe.INTERPRETED else f"the kernels run on a GPU, not on {device}"


@functools.cache
def _tried(device: torch.device) -> tuple[str | None, Exception | None]:
    try:
        reason = _at_a_glance(device)
    except Exception as error:  # whatever a damaged installation raises
        return _failed(f"Triton cannot be imported ({error!r})", error, device)
    if reason is None and device.type == "cuda":
        from reprune_triton.kernels import probe

        try:
            probe.load(device)
        except Exception as error:  # driver, compiler and assembler have errors of their own
            return _failed(f"Triton cannot compile for {device} ({error})", error, device)
    return reason, None


def _failed(reason: str, error: Exception, device: torch.device) -> tuple[str, Exception]:
    if device.type == "cuda":
        warnings.warn(f"{reason}: PyTorch computes what our kernels would.", stacklevel=4)
    return reason, error
