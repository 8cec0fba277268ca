"""One file a system: policies put together under the name that people know."""
