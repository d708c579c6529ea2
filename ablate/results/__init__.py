"""Results: what a study leaves on disk, and the tables that are made from it."""
