"""What a clock measures."""
