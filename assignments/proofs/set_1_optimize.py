"""Problem set 1: a second right answer and typical wrong ones for every problem."""

from assignments.proofs import Wrong

SOLUTIONS = {
    "weighted_gradient": """
def weighted_gradient(x, y, weights, theta, p):
    gradient = torch.zeros_like(theta)
    for row, wanted, weight in zip(x, y, weights):
        gradient += 2 * weight / weights.sum() * (row @ theta - wanted) * row
    for j in range(1, len(theta)):
        gradient[j] += 2 * p * theta[j]
    return gradient
""",
    "noise_budget": """
rate = 2 * share / sorted(curvatures)[-1]
c, v = np.array(curvatures), np.array(variances)


def settles(batch):
    squares = np.zeros_like(c)
    for _ in range(3000):
        squares = (1 - rate * c) ** 2 * squares + rate**2 * v / batch
    return float((c * squares).sum() / 2)


batch = 1
while settles(batch) > target:
    batch += 1
""",
    "moved_run": """
def moved_run(v, lr, mu):
    r = lr / (1 - mu)
    u = -(v * lr)
    return u, -u / r, r
""",
    "adamax": """
def adamax(p, gradients, rates, decay, betas):
    p, g = p.numpy().copy(), gradients.numpy()
    m, u, left = 0 * p, 0 * p, 1.0
    for row, lr in zip(g, rates):
        left *= betas[0]
        m += (1 - betas[0]) * (row - m)
        u = np.where(betas[1] * u > abs(row), betas[1] * u, abs(row))
        p -= lr * decay * p
        p -= lr / (1 - left) * m / u
    return torch.from_numpy(p)
""",
    "cheapest_threshold": """
def cheapest_threshold(probability, truth, missed, alarm):
    found = []
    for t in probability.tolist():
        cost = 0.0
        for p, is_one in zip(probability.tolist(), truth.tolist()):
            cost += missed if is_one and p < t else alarm if p >= t and not is_one else 0.0
        found.append((cost, t))
    cost, threshold = min(found)
    return threshold, cost
""",
}

WRONG = {
    "weighted_gradient": [
        Wrong("Both terms are squares", "return 2 *", "return"),
        Wrong("The squared error gives a factor 2", "errors = weights", "errors = 0.5 * weights"),
        Wrong("The penalty is a square as well", "pull = p * theta", "pull = p / 2 * theta"),
        Wrong("A weighted mean is divided by the sum", "weights.sum()", "len(x)"),
        Wrong("The sum is there, but the division", " / weights.sum()", ""),
        Wrong("You punish the intercept", "pull[0] = 0.0", "pass"),
        Wrong("All your rows count the same", "errors =", "weights = torch.ones_like(y)\n    errors ="),
        Wrong("Each squared error is weighted once", "errors = weights *", "errors = weights**2 *"),
        Wrong("The sign: this is the step downhill", "return 2", "return -2"),
        Wrong("The sign of the first term", "(x @ theta - y)", "(y - x @ theta)"),
        Wrong("The penalty is missing", " + pull", ""),
        Wrong(
            "You added the penalty itself",
            "pull = p * theta",
            "pull = p * theta**2 / 2",
        ),
        Wrong(
            "", source="def weighted_gradient(x, y, weights, theta, p):\n    return torch.tensor([1.0, 3.0]).double()"
        ),
        Wrong("", "return 2 *", "return 2 * len(x) *"),
    ],
    "noise_budget": [
        Wrong("Rounded down, or to the nearest", "math.ceil", "round"),
        Wrong("1/λmax is half of the stability limit", "share * 2 /", "share /"),
        Wrong("The steepest direction leaves first", "max(curvatures)", "min(curvatures)"),
        Wrong("Directions do not add up for stability", "max(curvatures)", "sum(curvatures)"),
        Wrong(
            "That is the fastest rate without noise",
            "share * 2 / max(",
            "2 / sum([min(curvatures), max(curvatures)]) #",
        ),
        Wrong("That is the floor of the squared error", "(2 * (2 - rate * c))", "(c * (2 - rate * c))"),
        Wrong("A factor 2: the loss of a direction", "(2 * (2 - rate * c))", "(2 - rate * c)"),
        Wrong("ηv/4 holds for small rates only", "(2 * (2 - rate * c))", "4"),
        Wrong("Rounded down, or to the nearest", "math.ceil", "int"),
        Wrong("A batch is a whole number", "math.ceil(alone / target)", "alone / target"),
        Wrong("The loss is a square", "alone / target", "(alone / target) ** 2"),
        Wrong("That is the mean over the directions", "alone / target", "alone / len(curvatures) / target"),
        Wrong(
            "You count the steepest direction alone", "zip(curvatures, variances)", "[(curvatures[-1], variances[-1])]"
        ),
        Wrong("", source="rate = 0.5\nbatch = 8"),
    ],
    "moved_run": [
        Wrong("The sign of u", "-lr * v", "lr * v"),
        Wrong("Inside keeps the rate in its velocity", "-lr * v", "-v"),
        Wrong("A mean is smaller than the sum", "(1 - mu) * v", "v"),
        Wrong("The old steps would go on", "(1 - mu) * v, lr / (1 - mu)", "v, lr"),
        Wrong("The mean is 1 − μ times the sum", "lr / (1 - mu)", "lr"),
        Wrong("The rate the wrong way round", "lr / (1 - mu)", "lr * (1 - mu)"),
        Wrong("You translate from the mean", "(1 - mu) * v, lr / (1 - mu)", "v / (1 - mu), lr * (1 - mu)"),
        Wrong("You are one step too far", "return", "v = mu * v\n    return"),
        Wrong("The run would forget its past", "return", "v = torch.zeros_like(v)\n    return"),
        Wrong("Two of them are exchanged", "-lr * v, (1 - mu) * v", "(1 - mu) * v, -lr * v"),
        Wrong("", "-lr * v, (1 - mu) * v, lr / (1 - mu)", "-0.5 * v, 0.25 * v, 2.0"),
    ],
    "adamax": [
        Wrong("m starts at zero and is too small", " / (1 - beta1**t)", ""),
        Wrong("The corrections are one step ahead", "beta1**t", "beta1**(t + 1)"),
        Wrong("Your t never moves", "beta1**t", "beta1"),
        Wrong("u is a maximum, not a mean", " / u\n", " / (u / (1 - beta2**t))\n"),
        Wrong("A large negative gradient", "g.abs()", "g"),
        Wrong("An old maximum must fade", "beta2 * u", "u"),
        Wrong(
            "That is a running mean of |g|", "torch.maximum(beta2 * u, g.abs())", "beta2 * u + (1 - beta2) * g.abs()"
        ),
        Wrong(
            "That is Adam's divisor",
            source="""
def adamax(p, gradients, rates, decay, betas):
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        p = (1 - lr * decay) * p - lr * m / (1 - betas[0] ** t) / v.sqrt()
    return p
""",
        ),
        Wrong(
            "The decay went through the gradient",
            source="""
def adamax(p, gradients, rates, decay, betas):
    m, u = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates), start=1):
        g = g + decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        u = torch.maximum(betas[1] * u, g.abs())
        p = p - lr * m / (1 - betas[0] ** t) / u
    return p
""",
        ),
        Wrong("The decay is multiplied by the rate", "1 - lr * decay", "1 - decay"),
        Wrong("You shrink after the step", "* p - lr * m / (1 - beta1**t) / u", "* (p - lr * m / (1 - beta1**t) / u)"),
        Wrong("The decay is missing", "(1 - lr * decay) * p", "p"),
        Wrong(
            "Every step has its own rate",
            "beta1, beta2 = betas",
            "beta1, beta2 = betas\n    rates = [rates[0]] * len(rates)",
        ),
        Wrong("The two betas are exchanged", "beta1, beta2 = betas", "beta2, beta1 = betas"),
        Wrong("The sign: a step goes against", "(1 - lr * decay) * p - lr", "p + lr"),
        Wrong(
            "",
            source="def adamax(p, gradients, rates, decay, betas):\n    return (1 - rates[0] * decay) * p + rates[0]",
        ),
    ],
    "cheapest_threshold": [
        Wrong("Of several that cost the same you take", "sorted(probability.tolist())", "probability.tolist()"),
        Wrong("0.5 is a habit", "sorted(probability.tolist())", "[0.5]"),
        Wrong("The costs are exchanged", "best = None\n", "best = None\n    missed, alarm = alarm, missed\n"),
        Wrong(
            "You took the threshold with the fewest errors",
            source="""
def cheapest_threshold(probability, truth, missed, alarm):
    cuts = sorted(probability.tolist())
    errors = [int(((probability >= cut) != truth).sum()) for cut in cuts]
    threshold = cuts[errors.index(min(errors))]
    called = probability >= threshold
    return threshold, missed * float((truth & ~called).sum()) + alarm * float((called & ~truth).sum())
""",
        ),
        Wrong(
            "The best F1 is not the lowest cost",
            source="""
def cheapest_threshold(probability, truth, missed, alarm):
    def f1(cut):
        called = probability >= cut
        return 2 * float((called & truth).sum()) / float(called.sum() + truth.sum())

    threshold = max(sorted(probability.tolist()), key=f1)
    called = probability >= threshold
    return threshold, missed * float((truth & ~called).sum()) + alarm * float((called & ~truth).sum())
""",
        ),
        Wrong(
            "alarm/(missed + alarm) is best for true probabilities",
            "sorted(probability.tolist())",
            "[alarm / (missed + alarm)]",
        ),
        Wrong("A picture whose probability equals", "probability >= threshold", "probability > threshold"),
        Wrong("The total cost is asked", "return best", "return best[0], best[1] / len(truth)"),
        Wrong("The order: first the threshold", "return best", "return best[::-1]"),
        Wrong("Return two numbers", "return best", "return best[0]"),
        Wrong("Of several thresholds that cost the same", "cost < best[1]", "cost <= best[1]"),
        Wrong("False alarms cost too", " + alarm * int((called & ~truth).sum())", ""),
        Wrong("Misses cost too", "missed * int((truth & ~called).sum()) + ", ""),
        Wrong("", source="def cheapest_threshold(probability, truth, missed, alarm):\n    return 0.4, 1.0"),
    ],
}
