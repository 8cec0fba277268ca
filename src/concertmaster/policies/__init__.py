"""What may serve a call, what it costs in seconds, which replica, who goes first."""
