"""Statistics of a finished study: pure functions of tables, seeded, without plotting."""
