"""The sections that only the report of a search has, one a file."""
