"""Transfer: a model that was trained for one task as the start of another."""
