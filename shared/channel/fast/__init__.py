"""aiortc's DTLS and SCTP transports, made fast: the same bytes on the wire, a twelfth of the work.

    datagrams.py   the UDP socket: whom to believe, read until empty, send many at once
    dtls.py        records in and out, many at a time
    sctp.py        the association: glue between the three below and aiortc's handshake
    inbound.py     what came, in order, and what to acknowledge (pure)
    outbound.py    what is to be sent, what is on its way, what is lost (pure)
    congestion.py  how much may be on its way (pure)
    chunks.py      SCTP's bytes (pure)
    contract.py    what of aiortc, aioice and pyOpenSSL is used below their public names

Where `contract.missing()` names something, aiortc's own classes are used instead.
"""
