"""The forward passes that modules are given."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from penstock.engine.attention import PagedLayer, Stage, attached
from penstock.engine.kernels import structures
from penstock.engine.kernels.linear import NativeLinear
from penstock.engine.kernels.native import Native

Norms = tuple[Tensor, Tensor, float]
"""RMSNorm weights of query and key heads, and epsilon."""


class FusedAttention:
    """Projections, rotation, KV store and attention of one layer.

    Args:
        module: finds its KV cache where the registered attention function would.
        qkv, out: the packed projections.
        keywords: what :func:`penstock.engine.kernels.paged_attention` is given besides tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        native: Native,
        qkv: nn.Module,
        out: nn.Module,
        keywords: Mapping[str, Any],
    ) -> None:
        # Weakly, here and below: the module has this as its forward, and two that held each other
        # would keep the weights until the garbage collector comes by.
        self._module = weakref.ref(module)
        self.qkv = qkv
        self.out = out
        self.keywords = keywords
        self.norms: Norms | None = None
        self._native = native
        query_norm, key_norm = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        if query_norm is not None and key_norm is not None:
            weights = query_norm.weight.detach(), key_norm.weight.detach()
            self.norms = (*weights, query_norm.variance_epsilon)

    @property
    def cache(self) -> PagedLayer:
        """The KV cache that is behind the module now."""
        module = self._module()
        assert module is not None, "a forward is called by its module"
        return attached(module)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As the module's own: ``[1, T, hidden]`` to ``[1, T, hidden]``."""
        layer = self.cache
        query = self._native.rotate_and_store(
            self.qkv(hidden_states)[0],
            position_embeddings,
            (layer.key_cache, layer.value_cache),
            layer.stage.slots,
            self.norms,
        )
        heads = self._native.paged_attention(
            query, layer.key_cache, layer.value_cache, layer.stage.batch, **self.keywords
        )
        return self.out(heads.flatten(1)[None]), None


class Workspace:
    """What the fused layers of a model share: the step's structure, and scratch memory."""

    def __init__(self) -> None:
        self._step = structures.Step()
        self._batch: object = None
        self._angles: tuple[Tensor, Tensor] | None = None
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    def step(self, stage: Stage, angles: tuple[Tensor, Tensor], width: int) -> structures.Step:
        """The structure of the step on the stage, made once per step."""
        tokens = angles[0].shape[-2]
        if self._scratch.numel() < tokens * width:
            self._scratch = torch.empty(tokens * width, dtype=torch.bfloat16)
        elif self._batch is stage.batch and self._angles is angles:
            return self._step
        batch = stage.batch
        self._batch, self._angles = batch, angles
        self._step = structures.Step(
            angles[0].data_ptr(),
            angles[1].data_ptr(),
            stage.slots.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context.data_ptr(),
            batch.block_table.data_ptr(),
            tokens,
            batch.context.shape[0],
            batch.block_table.stride(0),
            self._scratch.data_ptr(),
            torch.get_num_threads(),
        )
        return self._step


class FusedLayer:
    """A decoder layer: attention and MLP, each behind an RMSNorm and added to its input.

    Args:
        attention: its attention.
        linears: the four projections: into attention and out of it, into the MLP and out of it.
        norms: the RMSNorm modules before attention and before the MLP.
        heads: how many KV heads, and their dimension.
        workspace: shared by the layers of a model.
    """

    def __init__(
        self,
        native: Native,
        attention: FusedAttention,
        linears: tuple[NativeLinear, NativeLinear, NativeLinear, NativeLinear],
        norms: tuple[Any, Any],
        heads: tuple[int, int],
        workspace: Workspace,
    ) -> None:
        self._native = native
        self.heads = heads
        self._attention = attention
        self._workspace = workspace
        # A cache that nobody else has any more is to be freed.
        self._cache: Callable[[], PagedLayer | None] = lambda: None
        self._structure = structures.Layer(
            *(linear.layer.pointers for linear in linears),
            *(norm.weight.data_ptr() for norm in norms),
            *(norm.variance_epsilon for norm in norms),
        )
        sinks = attention.keywords["sinks"]
        # The structure holds bare pointers: whatever they lead to must live as long as it does.
        self._sinks = None if sinks is None else sinks.float().contiguous()
        self._owners = (linears, norms)
        self._width = native.layer_scratch(self._structure)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> Tensor:
        """As the module's own: ``[1, T, hidden]`` to ``[1, T, hidden]``."""
        out = hidden_states.clone(memory_format=torch.contiguous_format)
        self.run(out, position_embeddings)
        return out

    def run(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """The same, in place."""
        cache = self._attention.cache
        if cache is not self._cache():
            self._use(cache)
        step = self._workspace.step(cache.stage, angles, self._width)
        self._native.layer(self._structure, step, hidden_states)

    def _use(self, cache: PagedLayer) -> None:
        """Point the structure to a KV cache."""
        self._cache = weakref.ref(cache)
        keys, values = cache.key_cache, cache.value_cache
        _, kv_heads, block_size, dim = keys.shape
        layer, given = self._structure, self._attention.keywords
        heads = layer.out.inputs // dim
        for part in (layer.rotary, layer.attention):
            part.key_cache, part.value_cache = keys.data_ptr(), values.data_ptr()
            part.heads, part.kv_heads, part.dim = heads, kv_heads, dim
            part.block_size, part.bfloat16 = block_size, 1
        if self._attention.norms is not None:
            query_norm, key_norm, layer.rotary.eps = self._attention.norms
            layer.rotary.q_norm = query_norm.data_ptr()
            layer.rotary.k_norm = key_norm.data_ptr()
        layer.attention.value_dim = dim
        layer.attention.scale = given["scale"]
        layer.attention.window = given["window"] or 0
        layer.attention.softcap = given["softcap"] or 0.0
        layer.attention.sinks = 0 if self._sinks is None else self._sinks.data_ptr()


class FusedModel:
    """All layers of a model one after the other, without what transformers does in between.

    Args:
        module: embeds tokens, makes rotary angles, and has a norm at the end.
        layers: its layers.
    """

    def __init__(self, module: nn.Module, layers: Sequence[FusedLayer]) -> None:
        self._module = weakref.ref(module)
        self._own = type(module).forward
        self._layers = layers

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **keywords: Any,
    ) -> BaseModelOutputWithPast:
        """As the module's own, and by it unless called as the engine does."""
        others = any(value is not None and value is not False for value in keywords.values())
        module: Any = self._module()
        if input_ids is None or position_ids is None or others:
            result: BaseModelOutputWithPast = self._own(
                module, input_ids=input_ids, position_ids=position_ids, **keywords
            )
            return result
        hidden = module.embed_tokens(input_ids)
        angles = module.rotary_emb(hidden, position_ids)
        for layer in self._layers:
            layer.run(hidden, angles)
        return BaseModelOutputWithPast(last_hidden_state=module.norm(hidden))
