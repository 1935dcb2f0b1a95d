"""What is computed without a clock: instructions, bytes, hours."""
