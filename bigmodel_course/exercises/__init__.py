"""The exercises of each lesson: the right answer, and the wrong ones that the checks must know by name."""
