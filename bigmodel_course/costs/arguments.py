"""What every cost asks of its arguments."""

__all__ = [
    "at_least",
    "positive",
]


def at_least(low: int, **values: int) -> None:
    """Refuse the first of the named values that is below `low`."""
    for name, value in values.items():
        if value < low:
            raise ValueError(f"need {name} >= {low}, got {name}={value!r}")


def positive(**values: float) -> None:
    """Refuse the first of the named values that is not above 0; NaN is not."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"need {name} > 0, got {name}={value!r}")
