"""Anthropic Messages, OpenAI Responses and Embeddings, served by engines that speak OpenAI chat.

Modules named after an API are pure: bytes and fields in, bytes and fields out. ``translating``
stands between an exchange and its agent; ``desk`` knows which path speaks what.
"""
