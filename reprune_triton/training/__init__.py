"""The lean trainer: options, data, models, checkpoints and the loop."""
