"""Products of rows, sorted by group, with their own group's weight: mixture of experts."""
