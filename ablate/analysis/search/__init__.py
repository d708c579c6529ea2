"""What a search showed: its candidates, its finalists on fresh seeds, and how its settings matter."""
