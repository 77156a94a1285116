"""What carries KV from one instance to another, by the names that ``--kv-transport`` takes."""

from __future__ import annotations

from penstock.cluster.parcels import Inline, Transport
from penstock.server.factories import KVCodec


def transport(name: str, codec: KVCodec, device: str) -> Transport:
    """One of them; what it needs is imported here, and by no other.

    Args:
        name: ``inline``, ``object-store`` or ``nixl``.
        codec: of the engine's kind of KV.
        device: as the engine is told.

    Raises:
        Exception: it does not work here, in its own words.
    """
    if name == "inline":
        return Inline(codec)
    if name == "nixl":
        from penstock.cluster.direct import Direct

        return Direct(codec, device)
    from penstock.cluster.object_store import ObjectStore

    return ObjectStore(codec)
