"""Networks that run on their active filters: narrow while they train, compact in the end."""
