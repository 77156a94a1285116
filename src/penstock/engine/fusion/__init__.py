"""Faster forward passes for modules of a Hugging Face model, each proven equal before it is used.

A decoder layer as transformers defines it runs some sixty small PyTorch operations between its
matrix products; on a CPU at small batches they cost as much as the products.  Here RMSNorm, the
gated MLP and the projections, rotation and KV store of attention become a few calls into the
compiled kernels, and in bfloat16 a whole decoder layer becomes one.  No model definition changes:
a module keeps its identity and gets another ``forward``, and only after that has given the same
results as its own on random input.  What is not recognised, or comes out differently, is
left as it was.

RMSNorm and MLP are functions of their input alone, so equality on random input decides.  An
attention module or decoder layer may also depend on positions in ways no short input shows, so
only classes whose definition has been read are taken.
"""

from penstock.engine.fusion.rules import fuse

__all__ = ["fuse"]
