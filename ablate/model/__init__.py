"""Models: the transformer and its feed-forward layers."""
