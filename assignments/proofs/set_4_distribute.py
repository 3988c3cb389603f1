"""What proves problem set 4: other right answers, and wrong ones as students write them."""

from assignments.proofs import Wrong

SOLUTIONS = {
    "scattered_sum": """
def scattered_sum(me, size, x):
    held, ranks = x.double(), list(range(size))
    while len(ranks) > 1:
        half, place = len(ranks) // 2, ranks.index(me)
        lower, upper = held.chunk(2)
        partner = ranks[(place + half) % len(ranks)]
        if place < half:
            received = yield {partner: upper}
            held, ranks = lower + received[partner], ranks[:half]
        else:
            received = yield {partner: lower}
            held, ranks = upper + received[partner], ranks[half:]
    return held
""",
    "clipped_gradient": """
def clipped_gradient(pieces, gradient, limit):
    counts = [(piece != -1).sum().item() for piece in pieces]
    sums = [gradient(piece).nan_to_num(0.0) * n for piece, n in zip(pieces, counts)]
    packed = torch.zeros(len(sums[0]) + 1, dtype=sums[0].dtype)
    packed[1:] = torch.stack(sums).sum(dim=0)
    packed[0] = sum(counts)
    packed = yield packed
    mean = packed[1:] / packed[0]
    length = mean.pow(2).sum().sqrt()
    return mean if length <= limit else mean / length * limit
""",
    "to_read": """
def to_read(length, old, new, me):
    saved, held = math.ceil(length / old), math.ceil(length / new)
    found = []
    for place in range(me * held, min(length, me * held + held)):
        file, inside = divmod(place, saved)
        if found and found[-1][0] == file:
            found[-1] = (file, found[-1][1], inside + 1)
        else:
            found.append((file, inside, inside + 1))
    return found
""",
    "attend": """
def attend(q, k, v):
    scores = torch.einsum("td,nd->tn", q, k) / q.size(-1) ** 0.5
    own = scores.max(dim=-1, keepdim=True).values
    own_weights = torch.exp(scores - own)
    largest = yield ("max", own)
    factor = torch.exp(own - largest)
    top = yield ("sum", factor * (own_weights @ v))
    bottom = yield ("sum", factor * own_weights.sum(-1, keepdim=True))
    return top / bottom
""",
    "plan": """
per_device = parameters / tensor_ranks / stages / 1e9
left = memory_gb - activations_gb - 4 * per_device
data_ranks = math.ceil(12 * per_device / left)
while batch % data_ranks:
    data_ranks += 1
devices = tensor_ranks * stages * data_ranks
busy = 6 * parameters * tokens / devices / (peak_tflops * 1e12 * efficiency)
days = busy * (1 + (stages - 1) * data_ranks / batch) / (24 * 60 * 60)
""",
}

PLAN = """
cut = parameters / (tensor_ranks * stages)
data_ranks = next(n for n in range(1, batch + 1) if batch % n == 0 and {fits})
microbatches = {microbatches}
bubble = {bubble}
speed = {devices} * peak_tflops * 1e12 * {efficiency} * (1 - bubble)
days = {flops} * parameters * tokens / speed / {seconds}
"""
USUAL = {
    "fits": "cut * (4 + 12 / n) + activations_gb * 1e9 <= memory_gb * 1e9",
    "microbatches": "batch // data_ranks",
    "bubble": "(stages - 1) / (microbatches + stages - 1)",
    "devices": "tensor_ranks * stages * data_ranks",
    "efficiency": "efficiency",
    "flops": "6",
    "seconds": "86_400",
}


def plan(**changed):
    return PLAN.format(**USUAL | changed)


WRONG = {
    "scattered_sum": [
        Wrong("You send the half that you keep yourself", "chunks[theirs]}", "chunks[mine]}"),
        Wrong("What came has replaced your own numbers", "chunks[mine] +=", "chunks[mine] ="),
        Wrong("Return chunk `me`; every rank returns the first one", "return chunks[me]", "return chunks[0]"),
        Wrong("Return one chunk", "return chunks[me]", "return chunks.view(-1)"),
        Wrong("That is the mean", "return chunks[me]", "return chunks[me] / size"),
        Wrong(
            "That is the ring",
            source="""
def scattered_sum(me, size, x):
    chunks = list(x.clone().chunk(size))
    for hop in range(1, size):
        received = yield {(me + 1) % size: chunks[(me - hop) % size]}
        chunks[(me - hop - 1) % size] = chunks[(me - hop - 1) % size] + received[(me - 1) % size]
    return chunks[me]
""",
        ),
        Wrong(
            "One round, but size − 1 messages in it",
            source="""
def scattered_sum(me, size, x):
    chunks = x.chunk(size)
    received = yield {r: chunks[r] for r in range(size) if r != me}
    return chunks[me] + sum(received[r] for r in received)
""",
        ),
        Wrong(
            "You send whole vectors",
            source="""
def scattered_sum(me, size, x):
    d = size // 2
    while d:
        received = yield {me ^ d: x}
        x = x + received[me ^ d]
        d //= 2
    return x.chunk(size)[me]
""",
        ),
        Wrong(
            "You begin with the nearest rank",
            source="""
def scattered_sum(me, size, x):
    d = 1
    while d < size:
        lower, upper = x.chunk(2)
        if me & d:
            received = yield {me - d: lower}
            x = upper + received[me - d]
        else:
            received = yield {me + d: upper}
            x = lower + received[me + d]
        d *= 2
    return x
""",
        ),
        Wrong(
            "Partners must choose each other",
            "received = yield {me ^ count: chunks[theirs]}\n        chunks[mine] += received[me ^ count]",
            "partner = (me + count) % size\n"
            "        received = yield {partner: chunks[theirs]}\n"
            "        chunks[mine] += received[partner]",
        ),
        Wrong(
            "",  # right for two ranks
            source="""
def scattered_sum(me, size, x):
    half = len(x) // 2
    mine, theirs = (x[:half], x[half:]) if me % 2 == 0 else (x[half:], x[:half])
    received = yield {me ^ 1: theirs}
    return mine + received[me ^ 1]
""",
        ),
    ],
    "clipped_gradient": [
        Wrong(
            "You weight by all entries of a piece",
            "total = total + real * gradient(piece)\n            count += real",
            "total = total + piece.numel() * gradient(piece)\n            count += piece.numel()",
        ),
        Wrong(
            "You weight by rows",
            "total = total + real * gradient(piece)\n            count += real",
            "total = total + len(piece) * gradient(piece)\n            count += len(piece)",
        ),
        Wrong(
            "A mean of means",
            "total = total + real * gradient(piece)\n            count += real",
            "total = total + gradient(piece)\n            count += 1",
        ),
        Wrong("A piece without a token gives nan", "if real > 0:", "if True:"),
        Wrong("That is a sum over the tokens", "summed[:-1] / summed[-1]", "summed[:-1]"),
        Wrong("The norm may be above `limit`", "whole * min(1.0, limit / float(whole.norm()))", "whole"),
        Wrong(
            "A gradient below the limit stays as it is", "min(1.0, limit / float(whole.norm()))", "limit / whole.norm()"
        ),
        Wrong("You clip each entry", "whole * min(1.0, limit / float(whole.norm()))", "whole.clamp(-limit, limit)"),
        Wrong(
            "Each rank clips its own part",
            source="""
def clipped_gradient(pieces, gradient, limit):
    n = [int((p >= 0).sum()) for p in pieces]
    g = sum(c * gradient(p) for p, c in zip(pieces, n) if c) / sum(n)
    g = g * min(1, limit / g.norm()) * sum(n)
    total = yield torch.cat([g, torch.tensor([float(sum(n))], dtype=torch.float64)])
    return total[:-1] / total[-1]
""",
        ),
        Wrong(
            "Each rank is right for itself",
            source="""
def clipped_gradient(pieces, gradient, limit):
    real = [p for p in pieces if (p >= 0).any()]
    n = sum((p >= 0).sum() for p in real)
    g = sum((p >= 0).sum() * gradient(p) for p in real) / n
    total = yield torch.cat([g, torch.ones(1)])
    total = total[:-1] / total[-1]
    return total * min(1.0, limit / total.norm())
""",
        ),
        Wrong(
            "Right, with two all-reduces",
            "    summed = yield torch.cat([total, total.new_tensor([count])])\n    whole = summed[:-1] / summed[-1]",
            "    total = yield total\n    count = yield torch.tensor([count])\n    whole = total / count",
        ),
        Wrong(
            "An all-reduce for each piece",
            "    whole = summed[:-1] / summed[-1]",
            source="""
def clipped_gradient(pieces, gradient, limit):
    g, n = 0, 0
    for p in pieces:
        c = (p >= 0).sum()
        if c:
            g = g + (yield c * gradient(p))
            n = n + (yield c)
    g = g / n
    return g * min(1, limit / g.norm())
""",
        ),
        Wrong("", "return whole *", "return -whole *"),
    ],
    "to_read": [
        Wrong(
            "Shards are rounded up",
            "saved, held = -(-length // old), -(-length // new)",
            "saved, held = length // old, length // new",
        ),
        Wrong(
            "Those are places of the vector", "(file, start - file * saved, stop - file * saved)", "(file, start, stop)"
        ),
        Wrong("The third number is where to stop", "stop - file * saved)", "stop - start)"),
        Wrong("`stop` is excluded", "stop - file * saved)", "stop - file * saved - 1)"),
        Wrong("You read behind the vector's end", "min(length, (me + 1) * held)", "(me + 1) * held"),
        Wrong("Leave out the files", "        if start < stop:\n            spans.append", "        spans.append"),
        Wrong("A new shard may lie in several old files", "return spans", "return spans[:1]"),
        Wrong(
            "Old and new are swapped",
            "saved, held = -(-length // old), -(-length // new)",
            "old, new = new, old\n    saved, held = -(-length // old), -(-length // new)",
        ),
        Wrong(
            "You read whole files",
            "spans.append((file, start - file * saved, stop - file * saved))",
            "spans.append((file, 0, min(saved, length - file * saved)))",
        ),
        Wrong(
            "You cut as evenly as possible",
            source="""
def to_read(length, old, new, me):
    files = [chunk.tolist() for chunk in torch.arange(length).tensor_split(old)]
    mine = torch.arange(length).tensor_split(new)[me].tolist()
    found = []
    for number, file in enumerate(files):
        both = [place for place in file if place in set(mine)]
        if both:
            found.append((number, both[0] - file[0], both[-1] - file[0] + 1))
    return found
""",
        ),
        Wrong("", source="def to_read(length, old, new, me):\n    return [(1, 1, 3), (2, 0, 2)]\n"),
    ],
    "attend": [
        Wrong("Your maximum begins at 0", "scores.amax(dim=1)", "scores.amax(dim=1).clamp(min=0)"),
        Wrong("exp overflows", '    top = yield "max", scores.amax(dim=1)\n', "    top = torch.zeros(len(q))\n"),
        Wrong(
            "Each rank subtracts its own largest score",
            'top = yield "max", scores.amax(dim=1)',
            "top = scores.amax(dim=1)",
        ),
        Wrong(
            "One maximum for all queries",
            'top = yield "max", scores.amax(dim=1)',
            'top = yield "max", scores.max().view(1)',
        ),
        Wrong("You divide by your own weights' sum", "/ total[:, -1:]", "/ parts[:, -1:]"),
        Wrong("The scores are divided by √d", " / math.sqrt(q.shape[1])", ""),
        Wrong("You divide by d", "math.sqrt(q.shape[1])", "q.shape[1]"),
        Wrong(
            "A sum of softmaxes",
            source="""
def attend(q, k, v):
    out = yield "sum", (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=-1) @ v
    return out
""",
        ),
        Wrong(
            "A mean of attentions",
            source="""
def attend(q, k, v):
    own = (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=-1) @ v
    out = yield "sum", torch.cat([own, torch.ones_like(own[:, :1])], dim=1)
    return out[:, :-1] / out[:, -1:]
""",
        ),
        Wrong(
            "The number of keys is not their weight",
            source="""
def attend(q, k, v):
    own = (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=-1) @ v
    out = yield "sum", torch.cat([own, torch.ones_like(own[:, :1])], dim=1) * k.shape[0]
    return out[:, :-1] / out[:, -1:]
""",
        ),
        Wrong(
            "Your ranks do not communicate",
            source="def attend(q, k, v):\n    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ v\n",
        ),
        Wrong("", "scores.amax(dim=1)", "scores.amin(dim=1)"),
    ],
    "plan": [
        Wrong(
            "A GB is 10⁹ bytes", source=plan(fits="cut * (4 + 12 / n) + activations_gb * 2**30 <= memory_gb * 2**30")
        ),
        Wrong("It fits only without activations", source=plan(fits="cut * (4 + 12 / n) <= memory_gb * 1e9")),
        Wrong(
            "The batch cannot be shared out",
            source=plan(microbatches="batch / data_ranks").replace("batch % n == 0 and ", ""),
        ),
        Wrong(
            "Stage 1 divides the optimizer's 12 bytes only",
            source=plan(fits="cut * 16 / n + activations_gb * 1e9 <= memory_gb * 1e9"),
        ),
        Wrong("Adam's float32 copy", source=plan(fits="cut * (4 + 8 / n) + activations_gb * 1e9 <= memory_gb * 1e9")),
        Wrong("The devices wait in the bubble", source=plan(bubble="0")),
        Wrong("(p − 1)/m is waiting over work", source=plan(bubble="(stages - 1) / microbatches")),
        Wrong("Microbatches: a data rank has only", source=plan(microbatches="batch")),
        Wrong("Two FLOPs a parameter and token", source=plan(flops="2")),
        Wrong("No device reaches its peak", source=plan(efficiency="1")),
        Wrong("All devices work", source=plan(devices="data_ranks")),
        Wrong("These are hours", source=plan(seconds="3600")),
        Wrong("These are seconds", source=plan(seconds="1")),
        Wrong("", source="data_ranks, days = 8, 1000.0\n"),
    ],
}
