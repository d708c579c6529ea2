"""Balance: how evenly tokens use the leaves, why that changes, and what the unused ones are worth."""
