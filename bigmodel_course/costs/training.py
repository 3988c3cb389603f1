"""What training costs: the bytes it keeps, the traffic of a step, and seconds."""

from bigmodel_course.costs.arguments import positive

__all__ = [
    "optimizer_bytes",
    "optimizer_step_bytes",
    "seconds",
    "training_bytes",
]

# How many numbers a rule remembers for each parameter, from one step to the next.
STATES = {"SGD": 0, "Momentum": 1, "HeavyBall": 1, "Adagrad": 1, "RMSProp": 1, "Lion": 1, "Muon": 1}
STATES |= {"Adam": 2, "AdamW": 2, "AMSGrad": 3}  # AMSGrad is Adam(amsgrad=True)


def _states(rule: str) -> int:
    if rule not in STATES:
        raise ValueError(f"need a rule among {', '.join(STATES)}, got {rule=}")
    return STATES[rule]


def optimizer_bytes(parameters: int, rule: str, bytes_each: int = 4) -> int:
    """What the rule remembers: 0 for SGD, one number a parameter with momentum, two for Adam."""
    return _states(rule) * parameters * bytes_each


def training_bytes(parameters: int, rule: str, *, activations: int = 0, bytes_each: int = 4) -> int:
    """Weights, gradients, what the rule remembers, and `activations` numbers (batch * total(layers).activations)."""
    return (2 * parameters + activations) * bytes_each + optimizer_bytes(parameters, rule, bytes_each)


def optimizer_step_bytes(parameters: int, rule: str, bytes_each: int = 4) -> int:
    """The least traffic with memory of one step: read weight, gradient and states; write weight and states.

    For Adam 7 numbers, 28 bytes a parameter: no kernel is faster than that over the memory's bandwidth.
    """
    return (3 + 2 * _states(rule)) * parameters * bytes_each


def seconds(amount: float, rate: float) -> float:
    """Time for `amount` FLOPs (or bytes) at `rate` FLOPs (or bytes) a second."""
    positive(rate=rate)
    return amount / rate
