"""Choose the code that computes: the definition in PyTorch, or the Triton kernel below it."""

import os
from typing import Literal

import torch


class _Absent:
    """Stand in for triton where there is no wheel of it: files with kernels import, and their definitions run."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = _Absent()

Backend = Literal["auto", "torch", "triton"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as Python on the CPU, to be tested without a GPU


def use_triton(backend: Backend, x: torch.Tensor) -> bool:
    """Tell whether the kernel computes for `x`: "auto" takes it for fp32, fp16 and bf16 on a GPU.

    ValueError where "triton" is asked for and cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend={backend!r} is unknown: use auto, torch or triton")
    if backend == "torch":
        return False
    if backend == "auto":
        return x.is_cuda and x.dtype != torch.float64 and not isinstance(triton, _Absent)
    if x.dtype == torch.float64:
        raise ValueError("backend='triton': the kernels compute in fp32, so float64 needs backend='torch'")
    if isinstance(triton, _Absent):
        raise ValueError("backend='triton': triton is not installed here")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError("backend='triton' needs a GPU (or TRITON_INTERPRET=1 in the environment, which is slow)")
    return True


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Give x with the entries of a row side by side, as kernels read them; rows may lie anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run kernel[grid](*args, **options) on the device of its first tensor. Every launch comes through here, so that a
    tool can compile what is launched."""
    with torch.cuda.device_of(next(x for x in args if isinstance(x, torch.Tensor))):
        kernel[grid](*args, **options)
