"""Problem set 3: a second right answer and typical wrong ones for every problem."""

from assignments.proofs import Wrong

PLAN = """
weights = blocks * 12 * width**2
a_rank = blocks * 4 * width
largest_rank = (limit - 4 * weights) // (16 * a_rank)
learning = task_rank * a_rank
tasks = math.ceil(weights / (weights / times - learning))
"""


def plan(old, new):
    """A wrong plan; what is wrong goes into the numbers after it."""
    assert PLAN.count(old) == 1
    return PLAN.replace(old, new)


SOLUTIONS = {
    "nearest_mean": """
def nearest_mean(known, labels, new):
    mean, std = known.numpy().mean(0), known.numpy().std(0) + 1e-3
    sums, counts = {}, {}
    for row, label in zip((known.numpy() - mean) / std, labels.tolist()):
        sums[label] = sums.get(label, 0) + row
        counts[label] = counts.get(label, 0) + 1
    found = []
    for row in (new.numpy() - mean) / std:
        found.append(min(sums, key=lambda label: ((row - sums[label] / counts[label]) ** 2).sum()))
    return torch.tensor(found)
""",
    "believable": """
def believable(scores, y, temperatures, bins):
    z, labels = scores.numpy(), y.numpy()

    def softmax(t):
        e = np.exp(z / t - (z / t).max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def ece(p):
        sure, right = p.max(1), p.argmax(1) == labels
        which = np.digitize(sure, np.linspace(0, 1, bins + 1)[1:-1])
        return float(sum(abs((right[which == b] - sure[which == b]).sum()) for b in range(bins)) / len(labels))

    losses = [-np.log(softmax(t)[range(len(labels)), labels]).mean() for t in temperatures]
    best = temperatures[int(np.argmin(losses))]
    return best, ece(softmax(1.0)), ece(softmax(best))
""",
    "unfreezing_flops": """
def unfreezing_flops(forward, epochs, every):
    plain, kept, last = 0, 0, len(forward) - 1
    for i, flops in enumerate(forward):
        joins = (last - i) * every  # the epoch in which this layer begins to learn
        learning = max(0, epochs - joins)
        below = max(0, epochs - (last - i + 1) * every) if i > 0 else 0
        plain += flops * (epochs + learning + below)
        kept += flops * (learning + (1 if joins > 0 else 0) + learning + below)
    return plain, kept
""",
    "adapter_plan": """
def memory(r):
    frozen = learns = 0
    for _ in range(blocks):
        for name in ("query", "key", "value", "output", "wide", "narrow"):
            frozen += width * width * (4 if name in ("wide", "narrow") else 1)
            learns += r * (width + width) if name in ("query", "value") else 0
    return 4 * (frozen + learns) + 12 * learns, learns, frozen


largest_rank = 0
while memory(largest_rank + 1)[0] <= limit:
    largest_rank += 1
_, learning, frozen = memory(task_rank)
tasks = 1
while (frozen + tasks * learning) * times > tasks * frozen:
    tasks += 1
""",
    "best_adapter": """
def best_adapter(before, after, rank, alpha):
    u, s, vh = np.linalg.svd((after - before).numpy() * rank / alpha)
    root = np.sqrt(s[:rank])
    return torch.from_numpy(root[:, None] * vh[:rank]), torch.from_numpy(u[:, :rank] * root)
""",
}

WRONG = {
    "nearest_mean": [
        Wrong("`std` divides by K − 1", "correction=0", "correction=1"),
        Wrong("Put the features on one scale", "known, new = (known - centre) / size, (new - centre) / size", "pass"),
        Wrong(
            "The scale comes from the known pictures: new",
            "centre, size = known.mean(dim=0), known.std(dim=0, correction=0)",
            "centre, size = new.mean(dim=0), new.std(dim=0, correction=0)",
        ),
        Wrong(
            "The scale comes from the known pictures alone",
            "centre, size = known.mean(dim=0), known.std(dim=0, correction=0)",
            "both = torch.cat([known, new])\n    centre, size = both.mean(dim=0), both.std(dim=0, correction=0)",
        ),
        Wrong(
            "One scale for both",
            "(new - centre) / size",
            "(new - new.mean(dim=0)) / (new.std(dim=0, correction=0) + 0.001)",
        ),
        Wrong("You divide by the variance", "known.std(", "known.var("),
        Wrong("You add the pictures", "known[labels == label].mean(dim=0)", "known[labels == label].sum(dim=0)"),
        Wrong("You compare with the first picture", "known[labels == label].mean(dim=0)", "known[labels == label][0]"),
        Wrong(
            "You take the nearest single picture",
            "classes[torch.cdist(new, means).argmin(dim=1)]",
            "labels[torch.cdist(new, known).argmin(dim=1)]",
        ),
        Wrong(
            "These are places",
            "classes[torch.cdist(new, means).argmin(dim=1)]",
            "torch.cdist(new, means).argmin(dim=1)",
        ),
        Wrong("You take the farthest", "argmin", "argmax"),
        Wrong("The largest product", "torch.cdist(new, means).argmin", "(new @ means.T).argmax"),
        Wrong("That is the sum of the differences' sizes", "torch.cdist(new, means)", "torch.cdist(new, means, p=1)"),
        Wrong("", source="def nearest_mean(known, labels, new):\n    return torch.full((len(new),), 7)"),
    ],
    "believable": [
        Wrong("The number of ranges is an argument", "def error(t):", "def error(t, bins=10):"),
        Wrong("You chose T by the ECE", "key=loss", "key=error"),
        Wrong(
            "The accuracy is the same",
            "key=loss",
            "key=lambda t: -float(((scores / t).argmax(dim=1) == y).double().mean())",
        ),
        Wrong("That is the T of the *largest*", "best = min(", "best = max("),
        Wrong(
            "T = 1 is what the model has said",
            "best = min(temperatures, key=loss)",
            "best = min(temperatures, key=lambda t: abs(t - 1))",
        ),
        Wrong(
            "You multiply the scores",
            source="""
def believable(scores, y, temperatures, bins):
    def error(t):
        confidence, predicted = (scores * t).softmax(dim=1).max(dim=1)
        place = (confidence * bins).long().clamp(max=bins - 1)
        gap = torch.zeros(bins).double().index_add(0, place, (predicted == y).double() - confidence)
        return float(gap.abs().sum() / len(y))

    def loss(t):
        return float(-(scores * t).log_softmax(dim=1).gather(1, y[:, None]).mean())

    best = min(temperatures, key=loss)
    return best, error(1.0), error(best)
""",
        ),
        Wrong("Divide the scores by T, before", "    best =", "    scores = scores.softmax(dim=1)\n    best ="),
        Wrong(
            "A range with few pictures",
            "total += float(inside.sum() / len(y) * gap.abs())",
            "total += float(gap.abs()) / len(place.unique())",
        ),
        Wrong("You add the gaps", "inside.sum() / len(y) * gap.abs()", "gap.abs()"),
        Wrong("Too sure here and too careful there", "gap.abs()", "gap"),
        Wrong(
            "That is a root mean square",
            source="""
def believable(scores, y, temperatures, bins):
    def error(t):
        confidence, predicted = (scores / t).softmax(dim=1).max(dim=1)
        place = (confidence * bins).long().clamp(max=bins - 1)
        squares = 0.0
        for b in place.unique():
            part = place == b
            gap = float((predicted == y)[part].double().mean() - confidence[part].mean())
            squares += float(part.double().mean()) * gap**2
        return squares**0.5

    best = min(temperatures, key=lambda t: float(-(scores / t).log_softmax(dim=1).gather(1, y[:, None]).mean()))
    return best, error(1.0), error(best)
""",
        ),
        Wrong(
            "That is the largest gap",
            "total += float(inside.sum() / len(y) * gap.abs())",
            "total = max(total, float(gap.abs()))",
        ),
        Wrong("All pictures in one range", "(confidence * bins).long()", "(confidence * 0).long()"),
        Wrong(
            "The confidence is the largest probability",
            "        place =",
            "        confidence = (scores / t).softmax(dim=1).gather(1, y[:, None])[:, 0]\n        place =",
        ),
        Wrong("The order: T, then", "error(1.0), error(best)", "error(best), error(1.0)"),
        Wrong("That is the place of T", "return best,", "return float(temperatures.index(best)),"),
        Wrong("", source="def believable(scores, y, temperatures, bins):\n    return 3.0, 0.21413041, 0.00587715"),
    ],
    "unfreezing_flops": [
        Wrong("The first layer that learns needs no gradient", "forward[first + 1 :]", "forward[first:]"),
        Wrong("The gradient must pass through", " + sum(forward[first + 1 :])", ""),
        Wrong("You carry the gradient down", "sum(forward[first + 1 :])", "sum(forward)"),
        Wrong(
            "The gradients of the weights",
            "sum(forward[first:]) + sum(forward[first + 1 :])",
            "sum(forward[first + 1 :])",
        ),
        Wrong("All layers learn from the start", "max(0, len(forward) - 1 - epoch // every)", "0"),
        Wrong("Only the head ever learns", "max(0, len(forward) - 1 - epoch // every)", "len(forward) - 1"),
        Wrong("One more layer joins only every", "epoch // every", "epoch"),
        Wrong("The second layer joins one epoch early", "epoch // every", "(epoch + 1) // every"),
        Wrong(
            "Layers join from the end",
            source="""
def unfreezing_flops(forward, epochs, every):
    plain = 0
    for epoch in range(epochs):
        learns = min(len(forward), 1 + epoch // every)
        plain += sum(forward) + sum(forward[:learns]) + sum(forward[1:])
    return plain, plain
""",
        ),
        Wrong(
            "When all layers learn", "max(0, len(forward) - 1 - epoch // every)", "len(forward) - 1 - epoch // every"
        ),
        Wrong(
            "Kept outputs must be made once",
            "(sum(forward) if epoch == 0 else sum(forward[first:]))",
            "sum(forward[first:])",
        ),
        Wrong(
            "The frozen layers run only once in all",
            "if epoch == 0 else",
            "if epoch % every == 0 and epoch // every < len(forward) else",
        ),
        Wrong("The order: first `plain`", "return plain, kept", "return kept, plain"),
        Wrong("", source="def unfreezing_flops(forward, epochs, every):\n    return 230, 220"),
    ],
    "adapter_plan": [
        Wrong("Two matrices of a block are four times", source=plan("12 * width**2", "6 * width**2")),
        Wrong("The two wide matrices", source=plan("12 * width**2", "4 * width**2")),
        Wrong("An adapter has two factors", source=plan("4 * width\n", "2 * width\n")),
        Wrong("Only query and value get adapters, not", source=plan("4 * width\n", "8 * width\n")),
        Wrong("Only query and value get adapters. You", source=plan("4 * width\n", "(4 * 2 + 2 * 5) * width\n")),
        Wrong("The frozen weights are in memory", source=plan("limit - 4 * weights", "limit")),
        Wrong("These are numbers, and the limit", source=plan("limit - 4 * weights", "limit - weights")),
        Wrong("What learns takes four numbers of 4 bytes: value", source=plan("16 * a_rank", "12 * a_rank")),
        Wrong("What learns takes four numbers of 4 bytes: AdamW", source=plan("16 * a_rank", "8 * a_rank")),
        Wrong("What learns also has a gradient", source=plan("16 * a_rank", "4 * a_rank")),
        Wrong("One rank more does not fit", source=plan("// (16 * a_rank)", "// (16 * a_rank) + 1")),
        Wrong("All blocks together", source=PLAN + "learning //= blocks\n"),
        Wrong("One task fewer", source=plan("math.ceil(weights", "math.floor(weights")),
        Wrong("The base is stored too", source=PLAN + "tasks = 1\n"),
        Wrong("On disk an adapter is its values", source=plan("times - learning", "times - 4 * learning")),
        Wrong("That is how many adapters", source=PLAN + "tasks = math.ceil(weights / learning)\n"),
        Wrong("The adapters take space as well", source=PLAN + "tasks = times\n"),
        Wrong("", source="largest_rank, learning, tasks = 1, 64, 9"),
    ],
    "best_adapter": [
        Wrong("The layer multiplies by alpha / rank", " * rank / alpha", ""),
        Wrong("Divide by alpha / rank", " * rank / alpha", " * alpha / rank"),
        Wrong("The scale is alpha / rank, and", " * rank / alpha", " / alpha"),
        Wrong("Each factor divided by alpha / rank", "return vh[:rank],", "return vh[:rank] * rank / alpha,"),
        Wrong("That is `after` itself", "after - before", "after"),
        Wrong("The sign: the update", "after - before", "before - after"),
        Wrong("You keep the smallest", "return vh", "u, s, vh = u.flip(1), s.flip(0), vh.flip(0)\n    return vh"),
        Wrong("The first singular value", "return vh", "u, s, vh = u[:, 1:], s[1:], vh[1:]\n    return vh"),
        Wrong("The singular values are missing", " * s[:rank]", ""),
        Wrong("The singular values stand in both", "return vh[:rank],", "return vh[:rank] * s[:rank, None],"),
        Wrong("Their root stands in one", "* s[:rank]", "* s[:rank].sqrt()"),
        Wrong(
            "The order: first `down`",
            "return vh[:rank], u[:, :rank] * s[:rank] * rank / alpha",
            "return u[:, :rank] * s[:rank] * rank / alpha, vh[:rank]",
        ),
        Wrong(
            "Transposed: `down`",
            "return vh[:rank], u[:, :rank] * s[:rank] * rank / alpha",
            "return vh[:rank].T, (u[:, :rank] * s[:rank] * rank / alpha).T",
        ),
        Wrong("torch's svd gives vh", "return vh[:rank]", "return vh[:, :rank].T"),
        Wrong(
            "The first rows of the update",
            source="""
def best_adapter(before, after, rank, alpha):
    update = (after - before) * rank / alpha
    return update[:rank], torch.eye(len(update), dtype=torch.float64)[:, :rank]
""",
        ),
        Wrong(
            "That is the whole update",
            "return vh[:rank], u[:, :rank] * s[:rank]",
            "return vh, u * s",
        ),
        Wrong(
            "",
            source="""
def best_adapter(before, after, rank, alpha):
    return torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[3.0], [0.0]], dtype=torch.float64)
""",
        ),
    ],
}
