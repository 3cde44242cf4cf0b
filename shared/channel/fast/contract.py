"""What the fast transports use of aiortc, aioice and pyOpenSSL below their public names.

They lean on the very minor version named here. Where one of these is missing, the plain transports carry the
channel, which costs speed alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

log = logging.getLogger(__name__)

AIORTC = "1.16."
AIOICE = "0.13."

# Imported from a module.
NAMES: dict[str, tuple[str, ...]] = {
    "aioice.stun": ("parse_message",),
    "aiortc.rtcsctptransport": (
        "CHUNK_TYPES",
        "WEBRTC_BINARY",
        "WEBRTC_BINARY_EMPTY",
        "WEBRTC_DCEP",
        "WEBRTC_STRING",
        "WEBRTC_STRING_EMPTY",
        "Chunk",
        "DataChunk",
        "ForwardTsnChunk",
        "InitChunk",
        "SackChunk",
    ),
    "google_crc32c": ("extend",),
}
# Looked up on a class.
METHODS: dict[str, tuple[str, ...]] = {
    "aioice.ice.Connection": ("data_received", "protocol_lost"),
    "aioice.ice.StunProtocol": ("connection_lost", "datagram_received", "error_received"),
    "aioice.ice.CandidatePair": ("remote_addr",),
    "aiortc.RTCDataChannel": ("_addBufferedAmount", "_setId", "emit"),
    "aiortc.RTCDtlsTransport": ("_write_ssl", "start", "state"),
    "aiortc.RTCSctpTransport": (
        "State",
        "_abort",
        "_data_channel_flush",
        "_data_channel_send",
        "_handle_data",
        "_init",
        "_receive",
        "_receive_chunk",
        "_receive_data_chunk",
        "_receive_forward_tsn_chunk",
        "_receive_sack_chunk",
        "_reset_deferred_streams",
        "_set_state",
        "_t3_cancel",
        "_transmit_reconfig",
    ),
    "OpenSSL.SSL.Connection": ("bio_read", "bio_write", "get_protocol_version_name", "recv", "send"),
}
# Set on each instance, by the function named.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "aioice.ice.CandidatePair.__init__": ("protocol",),
    "aioice.ice.Connection.__init__": ("_check_list", "_nominated", "_protocols"),
    "aioice.ice.StunProtocol.__init__": ("receiver",),
    "aioice.ice.StunProtocol.connection_made": ("transport",),
    "aiortc.RTCDtlsTransport.__init__": ("_data_receiver", "_ssl"),
    "aiortc.RTCIceTransport.__init__": ("_connection",),
    "aiortc.RTCSctpTransport.__init__": (
        "_advertised_rwnd",
        "_association_state",
        "_data_channel_id",
        "_data_channel_queue",
        "_data_channels",
        "_last_received_tsn",
        "_local_port",
        "_local_tsn",
        "_local_verification_tag",
        "_outbound_stream_seq",
        "_reconfig_deferred",
        "_reconfig_queue",
        "_remote_max_message_size",
        "_remote_port",
        "_remote_verification_tag",
        "_rto",
    ),
    "aiortc.RTCSctpTransport._receive_chunk": ("_ssthresh",),
}


def missing() -> list[str]:
    """The names that are not there, and versions that are not those we know. Empty when all is well."""
    return [
        *_other_version("aiortc", AIORTC),
        *_other_version("aioice", AIOICE),
        *_absent(NAMES, lambda owner, name: hasattr(owner, name)),
        *_absent(METHODS, lambda owner, name: hasattr(owner, name)),
        *_absent(ATTRIBUTES, _sets),
    ]


def _other_version(package: str, known: str) -> list[str]:
    version = str(getattr(import_module(package), "__version__", "of unknown version"))
    return [] if version.startswith(known) else [f"{package} {known}* (this is {version})"]


def _absent(table: dict[str, tuple[str, ...]], has: Callable[[Any, str], bool]) -> list[str]:
    return [
        f"{place}.{name}"
        for place, names in table.items()
        for owner in [_found(place)]
        for name in names
        if owner is None or not has(owner, name)
    ]


def _found(place: str) -> Any:  # noqa: ANN401 - a module, a class or a function
    """What a dotted name stands for, or None."""
    parts = place.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)  # type: ignore[assignment]
        return found
    return None


def _sets(function: Any, name: str) -> bool:  # noqa: ANN401 - whatever was found
    """Whether a function mentions an attribute: to look at an instance takes a socket and a handshake."""
    return inspect.isfunction(function) and name in function.__code__.co_names
