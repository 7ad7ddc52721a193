"""What a plan looks like to a person; imports no torch."""
