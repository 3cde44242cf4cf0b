"""Fine-tune and use a model whose layers live in a swarm, from torch."""

from peer.remote.layers import RemoteLayers
from peer.remote.lora import Lora
from peer.remote.model import RemoteModel
from peer.remote.session import RemoteSession

__all__ = ["Lora", "RemoteLayers", "RemoteModel", "RemoteSession"]
