"""The errors people and programs meet. Each names the thing, the place and what was expected."""


class CorollaError(Exception):
    """Every error of ours; its text is one sentence that a person can act on."""


class ProtocolError(CorollaError):
    """Bytes that are not what the protocol says: wrong type, size, length or order."""


class BadSignature(ProtocolError):
    """A record that was not signed by the participant it names."""


class StaleRecord(ProtocolError):
    """A signed record that is too old, too far in the future, or older than one we already hold."""


class ConnectionLost(CorollaError):
    """A participant or relay can no longer be reached. The only kind of error that is retried."""


class ChannelClosed(ConnectionLost):
    """The channel to a participant is gone; a new one may be dialled."""


class RelayUnreachable(ConnectionLost):
    """No relay answers at the address given, or it lets nobody in until `retry_after_s` have passed."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Refused(CorollaError):
    """The other side understood and said no."""


class NoRoute(CorollaError):
    """The live spans do not cover the model."""


class Busy(CorollaError):
    """A peer has no room for another session now."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRoom(CorollaError):
    """No peers of the model could ever hold a session that long, however long one waits."""


class SessionFailed(CorollaError):
    """A hop met an error of its own while it served a session; asking again would meet it again."""


class SettingsError(CorollaError):
    """A flag or environment variable that cannot be used as given."""
