"""The report of a study: figures, tables and pages made from findings and tables."""
