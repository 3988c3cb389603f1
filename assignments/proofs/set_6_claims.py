"""What proves problem set 6: other right answers, and wrong ones as students write them."""

from assignments.proofs import Wrong

SOLUTIONS = {
    "printed_optimum": '''
def printed_optimum(q):
    """By halving: the loss is convex in s, and its slope is sigmoid(s) - q."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 / (1 + math.exp(-middle)) < q:
            low = middle
        else:
            high = middle
    s = torch.tensor(low, dtype=torch.float64)
    target = torch.tensor(q, dtype=torch.float64)
    return low, torch.nn.functional.binary_cross_entropy_with_logits(s, target).item()
''',
    "to_bits": """
def to_bits(x, bits):
    end = 2 ** (bits - 1) - 1
    for k in range(-80, 80):
        codes = (x * 2.0**-k).round()
        if -end <= codes.min() and codes.max() <= end:
            return codes.type(torch.int8), k
""",
    "counterexamples": """
def counterexamples(threshold):
    removed = -300 * threshold - 0.1 * threshold * torch.rand(8, 8)
    kept = torch.eye(8)
    kept[4:] = 0
    return removed, 5 * threshold * kept
""",
    "smallest_set": """
def smallest_set(w, x):
    table = torch.outer(x, x) * w
    return torch.nonzero(table.sum(dim=1) < 0).flatten().tolist()
""",
    "uncorrected": """
m, v, worst_step, worst_factor, settled = 0.0, 0.0, 0, 0.0, 1
for t in range(1, 5_000):
    m = beta1 * m + (1 - beta1)
    v = beta2 * v + (1 - beta2)
    f = m / v**0.5
    if f > worst_factor:
        worst_step, worst_factor = t, f
    if f > most:
        settled = t + 1
""",
    "audit": """
import re


def audit(printed, catalogue):
    def key(title):
        return re.sub(r"[\\W_]", "", title).lower()

    by_title = {key(work["title"]): number for number, work in catalogue.items()}

    def verdict(entry):
        stands = by_title.get(key(entry["title"]))
        if stands is None:
            return "title" if entry["number"] in catalogue else "unknown"
        if stands != entry["number"]:
            return "number"
        mine = [name.lower() for name in entry["authors"]]
        real = [name.lower() for name in catalogue[stands]["authors"]]
        if mine[-1] == "others":
            mine = mine[:-1]
            real = real[: len(mine)]
        return "right" if mine == real else "authors"

    return [verdict(entry) for entry in printed], len(set(key(entry["title"]) for entry in printed))
""",
}

S = "    return s, math.log1p(math.exp(-s)) + (1 - q) * s"
CODES = "    return torch.round(x / 2.0**k).to(torch.int8), k"
ENTROPY = "-sum(p * math.log(p) for p in (q, 1 - q) if p > 0)"
FACTORS = "(1 - beta1**t) / math.sqrt(1 - beta2**t)"
SETTLED = "1 + max(t for t in factors if factors[t] > most)"
EITHER = "1 + max([t for t in factors if factors[t] > most], default=0)"


def factors(formula):
    """The three values with another formula."""
    return f"""
factors = {{t: {formula} for t in range(1, 20_001)}}
worst_step = max(factors, key=factors.get)
worst_factor = factors[worst_step]
settled = {EITHER}
"""


WRONG = {
    "printed_optimum": [
        Wrong("Where does s reach 1?", "1 / (1 + math.exp(-1))", "0.75"),
        Wrong("That is what the repaired model says", S, f"    return q, {ENTROPY}"),
        Wrong("The output is right. Where s stops at an end", S, f"    return s, {ENTROPY}"),
        Wrong("That is σ(s)", S, S.replace("return s", "return 1 / (1 + math.exp(-s))")),
        Wrong("With s = q the printed loss", S, "    s = q\n" + S),
        Wrong("Not always an end", S, "    s = float(q > 0.5)\n" + S),
        Wrong("The labels are swapped", "    if q <= 0.5:", "    q = 1 - q\n    if q <= 0.5:"),
        Wrong(
            "The best s may lie outside",
            S,
            f"    s = math.inf if q == 1 else -math.inf if q == 0 else math.log(q / (1 - q))\n    return s, {ENTROPY}",
        ),
        Wrong(
            "s cannot pass 1 either",
            S,
            "    if q == 1:\n        return math.inf, 0.0\n    s = max(0.0, math.log(q / (1 - q))) if q else 0.0\n" + S,
        ),
        Wrong(
            "The loss is right for a probability s",
            S,
            "    good = -math.inf if s == 0 else math.log(s)\n    bad = -math.inf if s == 1 else math.log(1 - s)\n"
            "    return s, -((q * good if q else 0) + ((1 - q) * bad if q < 1 else 0))",
        ),
        Wrong("", source="def printed_optimum(q):\n    return 0.0, math.log(2)\n"),
    ],
    "to_bits": [
        Wrong(
            "That is the printed rule",
            source="def to_bits(x, bits):\n    return (x / 2**bits).round().to(torch.int8), bits\n",
        ),
        Wrong("One code too many", "2 ** (bits - 1) - 1", "2 ** (bits - 1)"),
        Wrong("You forgot the sign", "2 ** (bits - 1) - 1", "2**bits - 1"),
        Wrong(
            "You look at the largest number",
            source="""
def to_bits(x, bits):
    k = -40
    while torch.round(x.max() / 2.0**k) > 2 ** (bits - 1) - 1:
        k += 1
    return torch.round(x / 2.0**k).to(torch.int8), k
""",
        ),
        Wrong("A smaller k does: with yours", "    return torch", "    k += 1\n    return torch"),
        Wrong("These are the decoded floats", CODES, "    return torch.round(x / 2.0**k) * 2.0**k, k"),
        Wrong("The codes are right, but floats", CODES, "    return torch.round(x / 2.0**k), k"),
        Wrong("The codes are right, but of 8", CODES, "    return torch.round(x / 2.0**k).long(), k"),
        Wrong("You cut the fraction off", CODES, "    return (x / 2.0**k).to(torch.int8), k"),
        Wrong("The sign of k", CODES, f"{CODES[:-3]}, -k"),
        Wrong("That is the step", CODES, f"{CODES[:-3]}, 2.0**k"),
        Wrong(
            "A smaller k may do",
            source="""
def to_bits(x, bits):
    k = math.ceil(math.log2(x.abs().max() / (2 ** (bits - 1) - 1)))
    return torch.round(x / 2.0**k).to(torch.int8), k
""",
        ),
        Wrong(
            "Your k is too small, and you clip",
            source="""
def to_bits(x, bits):
    m = 2 ** (bits - 1) - 1
    k = math.floor(math.log2(x.abs().max() / m))
    return torch.round(x / 2.0**k).clamp(-m, m).to(torch.int8), k
""",
        ),
        Wrong(
            "Your k is too small: the largest codes",
            source="""
def to_bits(x, bits):
    k = math.floor(math.log2(x.abs().max() / (2 ** (bits - 1) - 1)))
    return torch.round(x / 2.0**k).to(torch.int8), k
""",
        ),
        Wrong("", source="def to_bits(x, bits):\n    return torch.tensor([4, -7], dtype=torch.int8), -3\n"),
    ],
    "counterexamples": [
        Wrong("", "100.5 * threshold", "1000.0"),
        Wrong(
            "The weights of `removed` are spread widely",
            "torch.full((8, 8), 100.5 * threshold)",
            "1000 * threshold * torch.randn(8, 8).sign()",
        ),
        Wrong("The weights of `removed` are small", "100.5 * threshold", "0.5 * threshold"),
        Wrong("The rule removes `kept`, whose spread", "kept[0, :4] = 9 *", "kept[0, :4] = 1 *"),
        Wrong(
            "The rule removes `kept`, whose spread",
            "    kept[0, :4] = 9 * threshold * torch.tensor([1.0, -1.0, 1.0, -1.0])\n",
            "",
        ),
        Wrong("A weight of `kept` is above 10 thresholds", "kept[0, :4] = 9 *", "kept[0, :4] = 90 *"),
        Wrong(
            "Most weights of `kept` must be exactly 0",
            "kept[0, :4] = 9 * threshold * torch.tensor([1.0, -1.0, 1.0, -1.0])",
            "kept = 9 * threshold * torch.rand(8, 8)",
        ),
        Wrong(
            "The two are swapped",
            "return torch.full((8, 8), 100.5 * threshold), kept",
            "return kept, torch.full((8, 8), 100.5 * threshold)",
        ),
        Wrong(
            "The conditions hold, but not the shapes",
            "torch.full((8, 8), 100.5 * threshold), kept",
            "torch.full((64,), 100.5 * threshold), kept.view(64)",
        ),
        Wrong(
            "They fit one threshold only",
            "    kept = torch.zeros(8, 8)",
            "    threshold = 0.05\n    kept = torch.zeros(8, 8)",
        ),
        Wrong("", source="def counterexamples(threshold):\n    return torch.zeros(8, 8), torch.randn(8, 8)\n"),
    ],
    "smallest_set": [
        Wrong("A neuron that contributes 0", "if c < 0", "if c <= 0"),
        Wrong("The sum over j runs along row i", "(w @ x)", "(w.T @ x)"),
        Wrong("x_i belongs to the product", "x * (w @ x)", "w @ x"),
        Wrong("The inputs are missing", "x * (w @ x)", "w.sum(dim=1)"),
        Wrong("Those make the sum large", "if c < 0", "if c > 0"),
        Wrong("You took j = i only", "x * (w @ x)", "w.diagonal() * x**2"),
        Wrong(
            "One neuron is not all",
            "[i for i, c in enumerate(contributions.tolist()) if c < 0]",
            "[contributions.argmin().item()]",
        ),
        Wrong(
            "That says of each neuron",
            "[i for i, c in enumerate(contributions.tolist()) if c < 0]",
            "(contributions < 0).tolist()",
        ),
        Wrong(
            "The right set, ordered by contribution",
            "[i for i, c in enumerate(contributions.tolist()) if c < 0]",
            "[i for i in contributions.argsort(stable=True).tolist() if contributions[i] < 0]",
        ),
        Wrong("", source="def smallest_set(w, x):\n    return [0]\n"),
    ],
    "uncorrected": [
        Wrong("The first step is not the worst one", "max(factors, key=factors.get)", "1"),
        Wrong(
            "Count the steps from 1",
            "for t in range(1, 20_001)}",
            "for t in range(1, 20_001)}\nfactors = {t - 1: f for t, f in factors.items()}",
        ),
        Wrong("Early steps are short", SETTLED, "min(t for t in factors if factors[t] <= most)"),
        Wrong("That is the last step", SETTLED, "max(t for t in factors if factors[t] > most)"),
        Wrong("You corrected m", source=factors("1 / math.sqrt(1 - beta2**t)")),
        Wrong("The step divides by the root of v", source=factors("(1 - beta1**t) / (1 - beta2**t)")),
        Wrong("The betas are swapped", source=factors("(1 - beta2**t) / math.sqrt(1 - beta1**t)")),
        Wrong("You corrected v", source=factors("1 - beta1**t")),
        Wrong("Upside down", "worst_factor = factors[worst_step]", "worst_factor = 1 / factors[worst_step]"),
        Wrong("", source="worst_step, worst_factor, settled = 12, 6.5, 1750\n"),
    ],
    "audit": [
        Wrong("Digits belong to a title", "c.isalnum()", "c.isalpha()"),
        Wrong("You compare titles letter for letter", '"".join(c for c in title.casefold() if c.isalnum())', "title"),
        Wrong(
            "You compare with the catalogue letter for letter",
            source="""
def audit(printed, catalogue):
    verdicts, titles = [], [work["title"] for work in catalogue.values()]
    for e in printed:
        n = e["number"]
        if n in catalogue and catalogue[n]["title"] == e["title"]:
            names, real = [x.lower() for x in e["authors"]], [x.lower() for x in catalogue[n]["authors"]]
            if names[-1] == "others":
                names, real = names[:-1], real[: len(names) - 1]
            verdicts.append("right" if names == real else "authors")
        elif e["title"] in titles:
            verdicts.append("number")
        else:
            verdicts.append("title" if n in catalogue else "unknown")
    return verdicts, len({"".join(filter(str.isalnum, e["title"].lower())) for e in printed})
""",
        ),
        Wrong(
            "A number that exists is not enough",
            'if work and plain(work["title"]) == plain(entry["title"]):',
            "if work:",
        ),
        Wrong(
            "The title exists, and yet",
            '        work = catalogue.get(entry["number"])\n',
            '        work = catalogue.get(entry["number"])\n'
            "        for real in catalogue.values():\n"
            '            if plain(real["title"]) == plain(entry["title"]):\n'
            "                work = real\n",
        ),
        Wrong("Nobody has looked at the authors", 'if same(entry["authors"], work["authors"]) else "authors"', ""),
        Wrong("The same names in another order", "else names == real", "else set(names) == set(real)"),
        Wrong(
            '"others" is no name',
            'names[:-1] == real[: len(names) - 1] if names[-1] == "others" else names == real',
            "names == real",
        ),
        Wrong("Names are missing", "else names == real", "else names == real[: len(names)]"),
        Wrong(
            "You compare the first author only",
            'names[:-1] == real[: len(names) - 1] if names[-1] == "others" else names == real',
            "names[0] == real[0]",
        ),
        Wrong(
            "A title under another number",
            '        elif plain(entry["title"]) in titles:',
            '        elif plain(entry["title"]) in titles and not work:',
        ),
        Wrong("`works` counts works, not entries", 'len({plain(entry["title"]) for entry in printed})', "len(printed)"),
        Wrong("`works`: titles that differ in case", '{plain(entry["title"]) for', '{entry["title"] for'),
        Wrong("`works` counts titles", '{plain(entry["title"]) for', '{entry["number"] for'),
        Wrong("Return a pair", 'return verdicts, len({plain(entry["title"]) for entry in printed})', "return verdicts"),
        Wrong("", source='def audit(printed, catalogue):\n    return ["right"] * len(printed), len(catalogue)\n'),
    ],
}
