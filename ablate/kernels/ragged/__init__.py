"""Ragged trees: the layer after pruning, where paths differ in length."""
