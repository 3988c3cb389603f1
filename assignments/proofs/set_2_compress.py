"""Problem set 2: a second right answer and typical wrong ones for every problem."""

from assignments.proofs import Wrong

SOLUTIONS = {
    "sparse_bytes": """
def csr(n):
    return n * value_bytes + n * index_bytes + rows * index_bytes + index_bytes


csr_bytes = csr(kept)
mask_bytes = (rows * columns + 7) // 8 + value_bytes * kept
pays_up_to = max(n for n in range(rows * columns) if csr(n) < rows * columns * value_bytes)
""",
    "group_mask": """
def group_mask(weight, h, keep, of):
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for i in range(weight.shape[0]):
        for first in range(0, weight.shape[1], of):
            group = list(range(first, first + of))
            group.sort(key=lambda j: -float(h[j]) * float(weight[i, j]) ** 2)
            for j in group[:keep]:
                mask[i, j] = True
    return mask
""",
    "half_bytes": """
def half_bytes(weight, group):
    packed, scales = [], []
    for row in weight.tolist():
        stored, own = [], []
        for first in range(0, len(row), group):
            part = row[first : first + group]
            own.append(max(map(abs, part)) / 7 or 1.0)
            stored += [round(w / own[-1]) + 8 for w in part]
        scales.append(own)
        packed.append([b << 4 | a for a, b in zip(stored[::2], stored[1::2])])
    return torch.tensor(packed, dtype=torch.uint8), torch.tensor(scales, dtype=torch.float64)
""",
    "pair_code": """
def pair_code(symbols):
    def lengths(counts):
        trees = [(c, i, [i]) for i, c in enumerate(counts)]
        depth = [0] * len(trees)
        while len(trees) > 1:
            trees.sort()
            (a, i, left), (b, _, right) = trees[:2]
            for leaf in left + right:
                depth[leaf] += 1
            trees = [*trees[2:], (a + b, i, left + right)]
        return depth

    p = torch.bincount(symbols).double()
    p = p[p > 0] / len(symbols)
    pairs = symbols.view(-1, 2).unique(dim=0, return_counts=True)[1].tolist()
    single = sum(q * length for q, length in zip(p.tolist(), lengths(p.tolist())))
    pair = sum(c * length for c, length in zip(pairs, lengths(pairs))) / len(symbols)
    return float(-(p * p.log2()).sum()), single, pair
""",
    "stored_teacher_loss": """
def stored_teacher_loss(student, values, classes, y, T, soft):
    total = 0.0
    for scores, known, which, label in zip(student.numpy(), values.numpy(), classes.tolist(), y.tolist()):
        log_sum = [np.logaddexp.reduce(scores / t) for t in (T, 1.0)]
        p = np.full(len(scores), max(1 - known.sum(), 0.0) / (len(scores) - len(which)))
        p[which] = known
        kl = sum(a * (math.log(a) - (s / T - log_sum[0])) for a, s in zip(p, scores) if a > 0)
        total += soft * T * T * kl + (1 - soft) * (log_sum[1] - scores[label])
    return float(total / len(student))
""",
}

WRONG = {
    "sparse_bytes": [
        Wrong("The largest *whole* number", "(room - 1) //", "room //"),
        Wrong(
            "CSR also stores where each row begins",
            source="""
csr_bytes = kept * (value_bytes + index_bytes)
mask_bytes = math.ceil(rows * columns / 8) + kept * value_bytes
pays_up_to = (value_bytes * rows * columns - 1) // (value_bytes + index_bytes)
""",
        ),
        Wrong(
            "One index more",
            source="""
csr_bytes = kept * (value_bytes + index_bytes) + rows * index_bytes
mask_bytes = math.ceil(rows * columns / 8) + kept * value_bytes
pays_up_to = (value_bytes * rows * columns - rows * index_bytes - 1) // (value_bytes + index_bytes)
""",
        ),
        Wrong(
            "The *rows* are compressed",
            source="""
csr_bytes = kept * (value_bytes + index_bytes) + (columns + 1) * index_bytes
mask_bytes = math.ceil(rows * columns / 8) + kept * value_bytes
pays_up_to = (value_bytes * rows * columns - (columns + 1) * index_bytes - 1) // (value_bytes + index_bytes)
""",
        ),
        Wrong(
            "Row and column for each value",
            source="""
csr_bytes = kept * (value_bytes + 2 * index_bytes)
mask_bytes = math.ceil(rows * columns / 8) + kept * value_bytes
pays_up_to = (value_bytes * rows * columns - 1) // (value_bytes + 2 * index_bytes)
""",
        ),
        Wrong("A value takes", "csr_bytes =", "value_bytes = {2: 4, 4: 2}[value_bytes]\ncsr_bytes ="),
        Wrong("You count a byte for every position", "math.ceil(rows * columns / 8)", "rows * columns"),
        Wrong("One bit for *every* position", "math.ceil(rows * columns / 8)", "math.ceil(kept / 8)"),
        Wrong("The last, broken byte", "math.ceil(rows * columns / 8)", "rows * columns // 8"),
        Wrong("Bytes are whole", "math.ceil(rows * columns / 8)", "rows * columns / 8"),
        Wrong("You begin a new byte for each row", "math.ceil(rows * columns / 8)", "rows * math.ceil(columns / 8)"),
        Wrong("The bits only say where", " + kept * value_bytes\nroom", "\nroom"),
        Wrong("The short formula forgets", "(room - 1) //", "value_bytes * rows * columns //"),
        Wrong("One too many", "(room - 1) // (value_bytes + index_bytes)", "room // (value_bytes + index_bytes) + 1"),
        Wrong("The largest *whole* number", "(room - 1) //", "room /"),
        Wrong("That is a density", "(room - 1) // (value_bytes", "room / (rows * columns) / (value_bytes"),
        Wrong("", source="csr_bytes, mask_bytes, pays_up_to = 44, 26, 8"),
        Wrong("", "kept * (value_bytes + index_bytes) +", "2 * kept * (value_bytes + index_bytes) +"),
    ],
    "group_mask": [
        Wrong("The right weights, but as numbers", ".view(weight.shape)", ".view(weight.shape).double()"),
        Wrong("By size alone", "h * weight**2", "weight**2"),
        Wrong("By the inputs alone", "h * weight**2", "h.expand_as(weight)"),
        Wrong("h is a mean square already", "h * weight**2", "h * weight.abs()"),
        Wrong("Multiply by h", "h * weight**2", "weight**2 / h"),
        Wrong("The sign does not matter", "h * weight**2", "h * weight"),
        Wrong("Upside down", "rank < keep", "rank >= keep"),
        Wrong("You keep those that cost least", "descending=True", "descending=False"),
        Wrong("`keep` says how many", "rank < keep", "rank < of - keep"),
        Wrong(
            "You chose from the whole row",
            source="""
def group_mask(weight, h, keep, of):
    cost = h * weight**2
    line = cost.sort(dim=1, descending=True).values[:, keep * weight.shape[1] // of - 1]
    return cost >= line[:, None]
""",
        ),
        Wrong(
            "One threshold for all weights",
            source="""
def group_mask(weight, h, keep, of):
    cost = h * weight**2
    return cost >= cost.flatten().sort(descending=True).values[keep * weight.numel() // of - 1]
""",
        ),
        Wrong(
            "Your groups run down the columns",
            source="""
def group_mask(weight, h, keep, of):
    cost = (h * weight**2).view(-1, of, weight.shape[1])
    rank = cost.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < keep).view(weight.shape)
""",
        ),
        Wrong(
            "Your groups take far columns together",
            source="""
def group_mask(weight, h, keep, of):
    cost = (h * weight**2).view(len(weight), of, -1)
    rank = cost.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < keep).view(weight.shape)
""",
        ),
        Wrong(
            "These are the weights that stay",
            "return (rank < keep).view(weight.shape)",
            "return weight * (rank < keep).view(weight.shape)",
        ),
        Wrong("", source="def group_mask(weight, h, keep, of):\n    return torch.tensor([[True, False, False, True]])"),
        Wrong("", "rank < keep", "rank <= keep"),
    ],
    "half_bytes": [
        Wrong("The numbers are right, but each takes more", "packed.to(torch.uint8)", "packed"),
        Wrong("One scale a row", "amax(dim=2)", "amax(dim=(1, 2))[:, None].repeat(1, grouped.shape[1])"),
        Wrong(
            "One scale for the whole matrix",
            "grouped.abs().amax(dim=2)",
            "grouped.abs().max() * torch.ones(grouped.shape[:2]).double()",
        ),
        Wrong("The codes end at 7", " / 7\n", " / 8\n"),
        Wrong("The largest *size* decides", "grouped.abs().amax", "grouped.amax"),
        Wrong("You cut off the digits", ".round().to(torch.int64)", ".to(torch.int64)"),
        Wrong("You round down", ".round()", ".floor()"),
        Wrong("Store code + 8", " + 8\n", " + 7\n"),
        Wrong("Negative codes wrap around", ".view(weight.shape) + 8", ".view(weight.shape) & 15"),
        Wrong(
            "The halves are exchanged", "codes[:, 0::2] + 16 * codes[:, 1::2]", "16 * codes[:, 0::2] + codes[:, 1::2]"
        ),
        Wrong(
            "Two *neighbours* share a byte",
            "codes[:, 0::2] + 16 * codes[:, 1::2]",
            "codes[:, : codes.shape[1] // 2] + 16 * codes[:, codes.shape[1] // 2 :]",
        ),
        Wrong("A group of zeros would be divided", "scales[scales == 0] = 1", "pass"),
        Wrong("The order: first the packed codes", "packed.to(torch.uint8), scales", "scales, packed.to(torch.uint8)"),
        Wrong(
            "Return the scale by which",
            "return packed.to(torch.uint8), scales",
            "return packed.to(torch.uint8), 1 / scales",
        ),
        Wrong(
            "",
            source="""
def half_bytes(weight, group):
    return torch.tensor([[95, 143]], dtype=torch.uint8), torch.tensor([[0.1, 0.2]], dtype=torch.float64)
""",
        ),
        Wrong("", "+ 16 * codes", "+ 8 * codes"),
    ],
    "pair_code": [
        Wrong("The entropy is asked in bits", "math.log2(c / n)", "math.log(c / n)"),
        Wrong("A pair is two symbols", "huffman_bits(pairs.values()) / n", "huffman_bits(pairs.values()) / (n / 2)"),
        Wrong(
            "−log₂ p rounded up",
            source="""
def pair_code(symbols):
    found = symbols.tolist()
    n = len(found)

    def bits(counts):
        return sum(c * math.ceil(-math.log2(c / sum(counts))) for c in counts)

    singles, pairs = list(Counter(found).values()), list(Counter(zip(found[::2], found[1::2])).values())
    return -sum(c / n * math.log2(c / n) for c in singles), bits(singles) / n, bits(pairs) / n
""",
        ),
        Wrong(
            "That is a fixed number of bits",
            source="""
def pair_code(symbols):
    found = symbols.tolist()
    n = len(found)
    singles, pairs = Counter(found), Counter(zip(found[::2], found[1::2]))
    entropy = -sum(c / n * math.log2(c / n) for c in singles.values())
    return entropy, float(math.ceil(math.log2(len(singles)))), math.ceil(math.log2(len(pairs))) / 2
""",
        ),
        Wrong(
            "You join all into one chain",
            source="""
def pair_code(symbols):
    def bits(counts):
        counts = sorted(counts)
        joined, total = counts[0], 0
        for c in counts[1:]:
            joined += c
            total += joined
        return total

    found = symbols.tolist()
    n = len(found)
    singles, pairs = Counter(found), Counter(zip(found[::2], found[1::2]))
    entropy = -sum(c / n * math.log2(c / n) for c in singles.values())
    return entropy, bits(singles.values()) / n, bits(pairs.values()) / n
""",
        ),
        Wrong(
            "What was joined must be sorted in",
            source="""
def pair_code(symbols):
    def bits(counts):
        line, total = sorted(counts), 0
        while len(line) > 1:
            a, b, *line = line
            line.append(a + b)
            total += a + b
        return total

    found = symbols.tolist()
    n = len(found)
    singles, pairs = Counter(found), Counter(zip(found[::2], found[1::2]))
    entropy = -sum(c / n * math.log2(c / n) for c in singles.values())
    return entropy, bits(singles.values()) / n, bits(pairs.values()) / n
""",
        ),
        Wrong(
            "These are entropies",
            source="""
def pair_code(symbols):
    found = symbols.tolist()

    def entropy(things):
        counts = Counter(things).values()
        return -sum(c / sum(counts) * math.log2(c / sum(counts)) for c in counts)

    return entropy(found), entropy(found), entropy(zip(found[::2], found[1::2])) / 2
""",
        ),
        Wrong("Your pairs overlap, so each symbol is coded twice", "found[0::2], found[1::2]", "found, found[1:]"),
        Wrong(
            "Your pairs overlap: each symbol belongs",
            "pairs = Counter(zip(found[0::2], found[1::2]))",
            "pairs = {pair: c / 2 for pair, c in Counter(zip(found, found[1:])).items()}",
        ),
        Wrong(
            "A pair has an order",
            "Counter(zip(found[0::2], found[1::2]))",
            "Counter(tuple(sorted(pair)) for pair in zip(found[0::2], found[1::2]))",
        ),
        Wrong(
            "These are the bits of all symbols",
            "return entropy, huffman_bits(singles.values()) / n, huffman_bits(pairs.values()) / n",
            "return entropy * n, huffman_bits(singles.values()), huffman_bits(pairs.values())",
        ),
        Wrong("You code single symbols once more", "huffman_bits(pairs.values())", "huffman_bits(singles.values())"),
        Wrong("", source="def pair_code(symbols):\n    return 0.5435644431995964, 1.0, 0.5"),
    ],
    "stored_teacher_loss": [
        Wrong("T² is missing", "soft * T**2 *", "soft *"),
        Wrong("T once is not enough", "T**2", "T"),
        Wrong("What is missing to 1 was dropped", "rest.expand_as(student)", "torch.zeros_like(student)"),
        Wrong(
            "You scale the stored values up",
            "rest.expand_as(student).scatter(1, classes, values)",
            "torch.zeros_like(student).scatter(1, classes, values / values.sum(dim=1, keepdim=True))",
        ),
        Wrong(
            "Only the N − k other classes",
            source="""
def stored_teacher_loss(student, values, classes, y, T, soft):
    rest = (1 - values.sum(dim=1, keepdim=True)) / student.shape[1]
    p = torch.zeros_like(student).scatter(1, classes, values) + rest
    log_q = (student / T).log_softmax(dim=1)
    divergence = (torch.special.xlogy(p, p) - p * log_q).sum(dim=1).mean()
    hard = -student.log_softmax(dim=1).gather(1, y[:, None]).mean()
    return soft * T**2 * divergence + (1 - soft) * hard
""",
        ),
        Wrong("The student is softened as well", "(student / T)", "student"),
        Wrong(
            "The stored values were softened already",
            "values)\n    log_q",
            "values)\n    p = (p / T).softmax(dim=1)\n    log_q",
        ),
        Wrong("The labels' part has no temperature", "-student.log_softmax", "-(student / T).log_softmax"),
        Wrong("You divide by pictures and classes", ".sum(dim=1).mean()", ".mean()"),
        Wrong("You add the pictures up", ".sum(dim=1).mean()", ".sum()"),
        Wrong("The other way round", "torch.special.xlogy(p, p) - p * log_q", "log_q.exp() * (log_q - p.log())"),
        Wrong("That is a cross-entropy", "torch.special.xlogy(p, p) - p * log_q", "-p * log_q"),
        Wrong("The two shares are exchanged", "return soft", "soft = 1 - soft\n    return soft"),
        Wrong("The labels are missing", " + (1 - soft) * hard", ""),
        Wrong(
            "exp of a thousand is infinite",
            source="""
def stored_teacher_loss(student, values, classes, y, T, soft):
    def softmax(z):
        return z.exp() / z.exp().sum(dim=1, keepdim=True)

    rest = (1 - values.sum(dim=1, keepdim=True)) / (student.shape[1] - values.shape[1])
    p = rest.expand_as(student).scatter(1, classes, values)
    divergence = (torch.special.xlogy(p, p) - p * softmax(student / T).log()).sum(dim=1).mean()
    hard = -softmax(student).gather(1, y[:, None]).log().mean()
    return soft * T**2 * divergence + (1 - soft) * hard
""",
        ),
        Wrong("0 · log 0 came out as nan", "torch.special.xlogy(p, p) - p * log_q", "p * (p.log() - log_q)"),
        Wrong(
            "", source="def stored_teacher_loss(student, values, classes, y, T, soft):\n    return 0.23556607131276655"
        ),
    ],
}
