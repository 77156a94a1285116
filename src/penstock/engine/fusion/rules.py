"""Which modules are given another forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine import kernels
from penstock.engine.fusion.forwards import FusedAttention, FusedLayer, FusedModel, Workspace
from penstock.engine.fusion.trial import TOKENS, PagedTrial, equal, layer_inputs
from penstock.engine.kernels.linear import NativeLinear, pack
from penstock.engine.kernels.native import Native


def _classes(kind: str, folders: Sequence[tuple[str, str]]) -> frozenset[str]:
    return frozenset(
        f"transformers.models.{folder}.modeling_{folder}.{name}{kind}" for folder, name in folders
    )


_DENSE = (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
_SPARSE = (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
_ATTENTION = _classes("Attention", _DENSE + _SPARSE)
_LAYER = _classes("DecoderLayer", _DENSE)
_MODEL = _classes("Model", _DENSE)
_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_DTYPES = (torch.float32, torch.bfloat16)


def fuse(model: nn.Module) -> int:
    """Give the model's modules faster forward passes; returns how many got one.

    Needs the compiled kernels and a model on the CPU in float32 or bfloat16 that was made with
    our attention; otherwise nothing happens.  The linear layers of fused modules are packed, as
    :func:`penstock.engine.kernels.prepack` does, which is for the rest of the model.
    """
    native = kernels.compiled()
    if native is None:
        return 0
    fuser = _Fuser(native)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Children first: a layer is fused from its fused parts.  Nothing holds a linear layer
        # after its turn, so its weights go as soon as they are packed.
        modules, fused = list(model.modules()), 0
        while modules:
            fused += fuser.fuse(modules.pop())
        return fused


class _Fuser:
    """Knows what it has fused already, by module."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._workspace = Workspace()
        self._norms: set[nn.Module] = set()
        self._mlps: dict[nn.Module, tuple[nn.Module, nn.Module]] = {}
        self._attentions: dict[nn.Module, FusedAttention] = {}
        self._layers: dict[nn.Module, FusedLayer] = {}

    def fuse(self, module: nn.Module) -> bool:
        """Fuse a module if one of the rules takes it."""
        weights = list(module.parameters())
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if kind in _LAYER:
            return self._layer(module)
        if kind in _MODEL:
            return self._model(module)
        if not weights or not all(
            w.is_cpu and w.dtype in _DTYPES and w.dtype is weights[0].dtype for w in weights
        ):
            return False
        if kind in _ATTENTION:
            return self._attention(module)
        return self._norm(module) or self._mlp(module)

    def _norm(self, module: Any) -> bool:
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", None)
        if "RMSNorm" not in type(module).__name__ or eps is None or weight is None:
            return False
        data, native, own = weight.detach().contiguous(), self._native, module.forward

        def forward(hidden_states: Tensor) -> Tensor:
            # transformers keeps some models' norms in float32 where all else is float16.
            if hidden_states.dtype is not data.dtype:
                result: Tensor = own(hidden_states)
                return result
            return native.rms_norm(hidden_states, data, eps)

        if not equal(module, forward, len(data)):
            return False
        self._norms.add(module)
        return _replace(module, forward)

    def _mlp(self, module: nn.Module) -> bool:
        linears = _linears(module, _MLP)
        if linears is None or _weighted(module) != set(_MLP):
            return False
        both, out = pack(_stack(*linears[:2])), pack(linears[2])
        if both is None or out is None:
            return False
        native = self._native

        def forward(x: Tensor) -> Tensor:
            result: Tensor = out(native.gated_silu(both(x)))
            return result

        if not equal(module, forward, linears[0].in_features):
            return False
        self._mlps[module] = both, out
        return _replace(module, forward, _MLP, gate_up=both, down=out)

    def _attention(self, module: Any) -> bool:
        linears = _linears(module, (*_QKV, "o_proj"))
        rest = {"q_norm", "k_norm"}
        if linears is None or not _weighted(module) <= {*_QKV, "o_proj"} | rest:
            return False
        dim = int(module.head_dim)
        kv_heads = linears[1].out_features // dim
        width, dtype = linears[0].in_features, linears[0].weight.dtype
        inputs = layer_inputs(width, dim, dtype)
        trial = PagedTrial(module.forward, inputs, [module], (kv_heads, dim), dtype)
        qkv, out = pack(_stack(*linears[:3])), pack(linears[3])
        if qkv is None or out is None:
            return False
        fused = FusedAttention(module, self._native, qkv, out, trial.keywords)
        if not trial.passes(fused.forward):
            return False
        self._attentions[module] = fused
        return _replace(module, fused.forward, (*_QKV, "o_proj"), qkv=qkv, out=out)

    def _layer(self, module: Any) -> bool:
        attention = self._attentions.get(module.self_attn)
        mlp = self._mlps.get(module.mlp)
        norms = module.input_layernorm, module.post_attention_layernorm
        if attention is None or mlp is None or not self._norms.issuperset(norms):
            return False
        qkv, out, (both, down) = attention.qkv, attention.out, mlp
        if not (
            isinstance(qkv, NativeLinear)
            and isinstance(out, NativeLinear)
            and isinstance(both, NativeLinear)
            and isinstance(down, NativeLinear)
        ):
            return False
        dim = int(module.self_attn.head_dim)
        heads = (qkv.out_features - out.in_features) // dim // 2, dim
        linears = qkv, out, both, down
        fused = FusedLayer(self._native, attention, linears, norms, heads, self._workspace)
        inputs = layer_inputs(qkv.in_features, dim, torch.bfloat16)
        trial = PagedTrial(module.forward, inputs, [module.self_attn], heads, torch.bfloat16)
        if not trial.passes(fused.forward):
            return False
        self._layers[module] = fused
        return _replace(module, fused.forward)

    def _model(self, module: Any) -> bool:
        layers = [self._layers.get(layer) for layer in module.layers]
        fused = [layer for layer in layers if layer is not None]
        # An embedding of another dtype than the layers' would not pass the trial.
        if len(fused) < len(layers) or module.norm not in self._norms:
            return False
        inputs = {
            "input_ids": torch.randint(0, module.embed_tokens.num_embeddings, (1, TOKENS)),
            "position_ids": torch.arange(TOKENS)[None],
            "use_cache": False,
        }
        sites = [layer.self_attn for layer in module.layers]
        trial = PagedTrial(module.forward, inputs, sites, fused[0].heads, torch.bfloat16)
        whole = FusedModel(module, fused)
        return trial.passes(whole.forward) and _replace(module, whole.forward)


def _linears(module: nn.Module, names: Sequence[str]) -> list[nn.Linear] | None:
    """Children of these names, if all are plain linear layers."""
    children = [getattr(module, name, None) for name in names]
    linears = [child for child in children if type(child) is nn.Linear]
    return linears if len(linears) == len(names) else None


def _weighted(module: nn.Module) -> set[str]:
    """Names of the children, and of itself, that hold parameters."""
    return {name.partition(".")[0] for name, _ in module.named_parameters()}


def _stack(*linears: nn.Linear) -> nn.Linear:
    """One linear layer whose output is that of these, side by side."""
    first = linears[0]
    with torch.device("meta"):
        stacked = nn.Linear(first.in_features, sum(part.out_features for part in linears))
    weight = torch.cat([part.weight for part in linears])
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    biases: list[nn.Parameter | None] = [part.bias for part in linears]
    stacked.register_parameter("bias", None)
    if any(bias is not None for bias in biases):
        filled: list[Tensor] = [
            part.weight.new_zeros(part.out_features) if bias is None else bias
            for part, bias in zip(linears, biases, strict=True)
        ]
        stacked.bias = nn.Parameter(torch.cat(filled), requires_grad=False)
    return stacked


def _replace(
    module: nn.Module, forward: Callable[..., Any], names: Sequence[str] = (), **packed: nn.Module
) -> bool:
    """Give a module its new forward, and packed layers in place of these children."""
    for name in names:
        delattr(module, name)
    for name, child in packed.items():
        module.add_module(name, child)
    module.forward = forward
    return True
