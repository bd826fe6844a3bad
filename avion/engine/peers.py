"""What the processes of a run know of each other without PyTorch."""

from avion.errors import UserError


class PeerError(UserError):
    """Another process failed. That process reports the error; this process only leaves because of it."""
