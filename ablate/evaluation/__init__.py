"""Quality: bits per byte, question answering, generation."""
