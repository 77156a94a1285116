"""Linear layers on a CPU whose weights are laid out once for fast matrix kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penstock.engine.kernels.choice import compiled
from penstock.engine.kernels.native import Native

# PyTorch's own compiler emits calls to these operators; they have no public name.
_ONEDNN = torch.ops.mkldnn

# oneDNN picks a layout for a number of rows.  The one for 16 measured as fast as the one for
# 256 at every batch size from 1 to 256; the one for 1 was slower.
_ROWS = 16


class OneDNNLinear(nn.Module):
    """``nn.Linear`` with a weight in oneDNN's blocked layout; float32 or bfloat16.

    Args:
        linear: the layer to take over; its weight is copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, bias = _parts(linear)
        self._packed: Tensor = _ONEDNN._reorder_linear_weight(weight, _ROWS)  # noqa: SLF001
        self._bias = bias
        self._call = _ONEDNN._linear_pointwise.default  # noqa: SLF001

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``; ``x`` is ``[..., in_features]``."""
        out: Tensor = self._call(x, self._packed, self._bias, "none", [], "")
        return out


class NativeLinear(nn.Module):
    """``nn.Linear`` in bfloat16 by our own kernel, which beats oneDNN's at batches up to 32.

    Args:
        linear: the layer to take over; its weight is copied.
        native: a library that :meth:`Native.packs` it.
    """

    def __init__(self, linear: nn.Linear, native: Native) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._native = native
        self.layer = native.pack_linear(*_parts(linear))

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``; ``x`` is bfloat16 ``[..., in_features]``."""
        return self._native.linear(self.layer, x, x.new_empty(*x.shape[:-1], self.out_features))


def pack(linear: nn.Linear) -> nn.Module | None:
    """The fastest layer with the same results, or None if this one is best as it is.

    Only a plain ``nn.Linear`` on a CPU is packed: a subclass may do more than multiply.
    float32 stays float32 throughout.
    """
    weight = linear.weight
    if type(linear) is not nn.Linear or not weight.is_cpu:
        return None
    native = compiled()
    if native is not None and native.packs(weight):
        return NativeLinear(linear, native)
    if not torch.backends.mkldnn.is_available():
        return None
    # Without vector instructions for it, oneDNN's bfloat16 is slower than PyTorch's own.
    fast = has_bfloat16() if weight.dtype is torch.bfloat16 else weight.dtype is torch.float32
    return OneDNNLinear(linear) if fast else None


def has_bfloat16() -> bool:
    """Whether this CPU has vector instructions for bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(
        _ONEDNN._is_mkldnn_bf16_supported()  # noqa: SLF001
    )


def prepack(model: nn.Module) -> int:
    """Replace the model's CPU linear layers by packed ones; return how many.

    Original weights are released as the layers are replaced.  An output head tied to the input
    embedding is packed too while the embedding keeps the original, so that one matrix is held
    twice.  The model can only infer afterwards: packed weights are neither parameters nor saved.
    """
    # By the id of the original, which no other has had: all of them were there at the start.
    packed: dict[int, nn.Module] = {}
    count = 0
    modules = list(model.modules())
    while modules:
        parent = modules.pop()
        for name in [name for name, _ in parent.named_children()]:
            child = parent.get_submodule(name)
            if type(child) is not nn.Linear:
                continue
            fast = packed.get(id(child)) or pack(child)
            if fast is None:
                continue
            packed[id(child)] = fast
            setattr(parent, name, fast)
            count += 1
    return count


def _parts(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias: nn.Parameter | None = linear.bias
    return linear.weight.detach(), None if bias is None else bias.detach()
