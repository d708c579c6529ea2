"""Tracking: every trial as an MLflow run, and every result as tables."""
