"""From the filters that stay to a network that runs on them: while it trains, and physically narrow."""
