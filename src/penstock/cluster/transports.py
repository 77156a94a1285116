"""What carries KV from one instance to another, by the names that ``--kv-transport`` takes."""

from __future__ import annotations

from penstock.cluster.parcels import Inline, Transport
from penstock.server.factories import KVCodec


def transport(name: str, codec: KVCodec) -> Transport:
    """One of them; what it needs is imported here, and by no other.

    Args:
        name: ``inline``, ``object-store`` or ``nixl``.
        codec: of the engine's kind of KV.
    """
    if name == "inline":
        return Inline(codec)
    if name == "nixl":
        from penstock.cluster.direct import Direct

        assert codec.tensors is not None, "refused at start for engines without tensors"
        return Direct(codec.tensors)
    from penstock.cluster.object_store import ObjectStore

    return ObjectStore(codec)
