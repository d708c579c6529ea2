"""One trial: settings in, result out. Knows nothing of tracking or studies."""
