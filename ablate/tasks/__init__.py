"""What a trial learns: data, a model around the feed-forward, and what is measured."""
