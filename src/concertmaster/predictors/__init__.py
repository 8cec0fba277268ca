"""What a call and the rest of its workflow will need, as distributions."""
