"""Studies: from a study file to finished trials, whatever happens on the way."""
