"""Parameters that must not lose precision when a model is cast."""

from collections.abc import Callable
from itertools import chain

from torch import Tensor, nn

from nemo_hybrid.config.model import FP32_NAMES


def keeps_fp32(name: str) -> bool:
    """Whether a parameter or buffer of this name is fp32 in every model, run and file."""
    return name.rpartition(".")[2] in FP32_NAMES


class KeepsFp32(nn.Module):
    """A module whose own tensors named in ``FP32_NAMES`` keep their dtype under any cast, gradients
    included.

    Moves between devices still apply, so ``model.to("cuda", torch.bfloat16)`` does what it should.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsFp32":
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        tensors = [tensor for name, tensor in own if keeps_fp32(name)]
        tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
        kept = {id(tensor) for tensor in tensors}

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(apply, recurse=recurse)
