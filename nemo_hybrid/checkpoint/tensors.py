"""safetensors files, written as streams (no second pass to hash, no copy of a whole file) and read
by the reference library.

Format: https://github.com/huggingface/safetensors#format. Order of tensors and spacing of the
header are those of the reference library, so that equal contents give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming

# In the order in which the reference library places tensors (then by name).
DTYPES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(DTYPES)
_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    fetch: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one part per tensor; tensors may be on any device.

    With ``fetch`` the given tensors say shape and dtype only (they may be on the meta device), and
    it is called for each tensor when its turn comes.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensor_bytes(fetch(name) if fetch else tensors[name])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view where the tensor allows it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Entry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes; of a dtype that is none of `DTYPES` 0."""
        return prod(self.shape) * _SIZES.get(self.dtype, 0)


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise UserError for a weight that holds NaN or infinity; whatever is computed with it would
    be blamed instead. ``path``: the file or directory that it came from."""
    # A sum is quick, but may overflow.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} holds NaN or infinity (as {kind}): the weights are broken")


class TensorFile:
    """A safetensors file open for reading; a context manager. It is mapped into memory: what is not
    asked for is not read, and what was read the system may drop again.

    ``entries`` are in the order of the data. Raises UserError naming the path when it is absent,
    truncated, or its header is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming("read", path):
            open(path, "rb").close()  # its error names the reason, the library's the path again
            try:
                self._file = safe_open(path, "pt")
            except SafetensorError as error:
                raise UserError(f"{path} is not a valid safetensors file: {error}") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        slices = ((name, self._file.get_slice(name)) for name in self._file.offset_keys())
        self.entries = {
            name: Entry(found.get_dtype(), tuple(found.get_shape())) for name, found in slices
        }

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def read(self, name: str, at: int | slice | None = None) -> torch.Tensor:
        """A tensor, or a part of its first dimension, in memory of its own."""
        return self.view(name, at).clone()

    @torch.no_grad()
    def read_into(self, target: torch.Tensor, name: str, at: int | slice | None = None) -> None:
        """The same into a tensor of that shape, rounded or widened to its dtype."""
        target.copy_(self.view(name, at))

    def view(self, name: str, at: int | slice | None = None) -> torch.Tensor:
        """The same without a copy: not to be written to, and read while the file is open."""
        return self._file.get_tensor(name) if at is None else self._file.get_slice(name)[at]


@contextmanager
def opened(paths: Iterable[Path]) -> Iterator[dict[str, Callable[[], torch.Tensor]]]:
    """What reads each tensor of several files, by its name, as long as they are open."""
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(path)) for path in paths]
        yield {name: partial(file.read, name) for file in files for name in file.entries}
