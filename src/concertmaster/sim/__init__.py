"""Driver one: virtual time."""
