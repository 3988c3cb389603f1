"""The numbers of each problem set: `draw(random)` gives those of another copy."""
