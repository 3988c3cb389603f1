"""What proves problem set 5: other right answers, and wrong ones as students write them."""

from assignments.proofs import Wrong

SOLUTIONS = {
    "int8_linear": """
import torch


def int8_linear(x, codes, scales, bias):
    values, matrix = torch.tensor(x), torch.tensor(codes)
    ends = [min(0.0, values.min().item()), max(0.0, values.max().item())]
    step = (ends[1] - ends[0]) / 255
    shift = int(round(-ends[0] / step))
    eight_bits = torch.clamp(torch.round(values / step) + shift, 0, 255).to(torch.uint8)
    sums = torch.einsum("bk,nk->bn", eight_bits.long() - shift, matrix.long())
    y = sums.double() * step * torch.tensor(scales) + torch.tensor(bias)
    half_steps = (matrix.double() * torch.tensor(scales)[:, None]).abs().sum(1) * step / 2
    return y.numpy(), half_steps.numpy()
""",
    "slowest_of": """
def slowest_of(latencies, parts, share):
    each = share ** (1 / parts)
    place = math.ceil(len(latencies) * each - 1e-9)
    return sorted(latencies)[max(place, 1) - 1]
""",
    "batched": '''
def batched(arrivals, largest, wait, fixed, each):
    """Event by event: the clock jumps to whatever happens next."""
    coming, waiting, done, free = list(arrivals), [], [], 0.0
    now = coming[0]
    while coming or waiting:
        while coming and coming[0] <= now:
            waiting.append(coming.pop(0))
        if now >= free and waiting and (len(waiting) >= largest or now >= waiting[0] + wait):
            batch, waiting = waiting[:largest], waiting[largest:]
            free = now + fixed + each * len(batch)
            done.extend(free - t for t in batch)
            continue
        events = [t for t in (free, waiting[0] + wait if waiting else now) if t > now] + coming[:1]
        now = min(events)
    return done
''',
    "admitted": '''
def admitted(times, rate, burst):
    """By the time at which the bucket will be full again."""
    full_at, waits = times[0], []
    for now in times:
        full_at = max(full_at, now)
        missing = (full_at - now) * rate + 1 - burst
        if missing <= 0:
            full_at += 1 / rate
        waits.append(max(0.0, missing / rate))
    return waits
''',
    "ingress": """
def ingress(load, safe, tries):
    left = dict(load)
    while left and tries > 0:
        fewest = min(left.values())
        name = next(n for n in left if left[n] == fewest)
        del left[name]
        tries -= 1
        outcome = yield name
        if outcome[0] == "sealed":
            return (200, outcome[1])
        nothing_done = outcome[0] == "busy" or outcome[0] == "refused"
        if not nothing_done and not safe:
            return (502, None)
    return (503, None)
""",
    "capacity": """
work = requests_per_second * service_ms * 1e-3
replicas = 1
while work / replicas > busy_at_most:
    replicas += 1
replicas += 1
in_flight = latency_ms * 1e-3 * requests_per_second
minutes = 43_200 * sum(math.comb(replicas, k) * (1 - up) ** k * up ** (replicas - k) for k in range(2, replicas + 1))
""",
}

UNSAFE = 'if kind in ("unsealed", "lost") and not safe:'
PER_SECOND = "requests_per_second * service_ms / 1000 / busy_at_most"
MINUTES = "(1 - enough) * 30 * 24 * 60"

WRONG = {
    "int8_linear": [
        Wrong("`zero` is rounded to the nearest", "zero = round(-low / scale)", "zero = int(-low / scale)"),
        Wrong("Keep the codes within 0", "np.clip(np.round(x / scale) + zero, 0, 255)", "(np.round(x / scale) + zero)"),
        Wrong("Round `x / scale` first", "np.round(x / scale) + zero", "np.round(x / scale - low / scale)"),
        Wrong(
            "The range must hold 0", "low, high = min(x.min(), 0.0), max(x.max(), 0.0)", "low, high = x.min(), x.max()"
        ),
        Wrong("Between 256 codes there are 255 steps", "(high - low) / 255", "(high - low) / 256"),
        Wrong("Subtract `zero` from the codes", "(rounded - zero) @", "rounded @"),
        Wrong("You cut the fraction off", "np.round(x / scale)", "np.floor(x / scale)"),
        Wrong("Each output has its own weight scale", "scale * scales * sums", "scale * scales.mean() * sums"),
        Wrong("The bias is in real units", "scale * scales * sums + bias", "scale * scales * (sums + bias)"),
        Wrong("The bound: rounding is off by half", "bound = scale / 2 *", "bound = scale *"),
        Wrong(
            "The bound: errors may all point the same way", "np.abs(codes.astype(np.int32))", "codes.astype(np.int32)"
        ),
        Wrong("The bound: weights are codes times", ".sum(axis=1) * scales", ".sum(axis=1)"),
        Wrong("The bound: every input's error counts", ".sum(axis=1) * scales", ".max(axis=1) * scales"),
        Wrong(
            "Your sums wrap around",
            "    rounded = np.clip(np.round(x / scale) + zero, 0, 255).astype(np.int32)\n"
            "    sums = (rounded - zero) @ codes.astype(np.int32).T",
            "    rounded = np.clip(np.round(x / scale) + zero, 0, 255).astype(np.uint8)\n"
            "    sums = (rounded - zero) @ codes.T",
        ),
        Wrong(
            "One scale for all of `x`",
            "    low, high = min(x.min(), 0.0), max(x.max(), 0.0)\n"
            "    scale = (high - low) / 255\n    zero = round(-low / scale)",
            "    low, high = x.min(axis=1, keepdims=True).clip(max=0), x.max(axis=1, keepdims=True).clip(min=0)\n"
            "    scale = (high - low) / 255\n    zero = np.round(-low / scale)",
        ),
        Wrong(
            "That is a symmetric grid",
            source="""
def int8_linear(x, codes, scales, bias):
    scale = np.abs(x).max() / 127
    q = np.round(x / scale).astype(int)
    return (q @ codes.T.astype(int)) * scale * scales + bias, scale / 2 * np.abs(codes.astype(int)).sum(1) * scales
""",
        ),
        Wrong(
            "",
            source="def int8_linear(x, codes, scales, bias):\n"
            "    return x @ (codes * scales[:, None]).T + bias, 0 * bias\n",
        ),
    ],
    "slowest_of": [
        Wrong("The share may be reached exactly", "** parts < share", "** parts <= share"),
        Wrong("That is one replica's percentile", "(count / len(ordered)) ** parts", "count / len(ordered)"),
        Wrong("The other way round", "(count / len(ordered)) ** parts", "(count / len(ordered)) ** (1 / parts)"),
        Wrong(
            "That is the quickest of all",
            "(count / len(ordered)) ** parts < share",
            "count / len(ordered) < 1 - (1 - share) ** parts",
        ),
        Wrong(
            "All must be in time",
            "(count / len(ordered)) ** parts < share",
            "1 - (1 - count / len(ordered)) ** parts < share",
        ),
        Wrong(
            "You share the late ones out",
            "(count / len(ordered)) ** parts < share",
            "count / len(ordered) < 1 - (1 - share) / parts",
        ),
        Wrong("One place too far", "ordered[count - 1]", "ordered[count]"),
        Wrong("One place too early", "ordered[count - 1]", "ordered[count - 2]"),
        Wrong("The slowest of all", "ordered[count - 1]", "ordered[-1]"),
        Wrong(
            "You interpolate",
            source="def slowest_of(latencies, parts, share):\n"
            "    return float(np.percentile(latencies, 100 * share ** (1 / parts)))\n",
        ),
        Wrong(
            "The replicas work at the same time",
            source="""
def slowest_of(latencies, parts, share):
    return parts * sorted(latencies)[math.ceil(share * len(latencies)) - 1]
""",
        ),
        Wrong("", source="def slowest_of(latencies, parts, share):\n    return 4\n"),
    ],
    "batched": [
        Wrong("The oldest request waits for others", "arrivals[first] + wait))", "arrivals[first]))"),
        Wrong(
            "A full batch need not wait any longer",
            "max(free, min(full, arrivals[first] + wait))",
            "max(free, arrivals[first] + wait)",
        ),
        Wrong(
            "`wait` counts from the arrival",
            "max(free, min(full, arrivals[first] + wait))",
            "max(free, min(full, max(free, arrivals[first]) + wait))",
        ),
        Wrong(
            "You wait until the batch is full",
            "        start = max(free, min(full, arrivals[first] + wait))",
            "        start = max(free, full if full < math.inf else arrivals[first] + wait)",
        ),
        Wrong(
            "While the worker is busy the batch fills on",
            "if t <= start]",
            "if t <= min(full, arrivals[first] + wait)]",
        ),
        Wrong("At most `largest` requests", "arrivals[first : first + largest] if", "arrivals[first:] if"),
        Wrong("`fixed` is paid once a batch", "fixed + each * len(batch)", "(fixed + each) * len(batch)"),
        Wrong("A larger batch takes longer", "fixed + each * len(batch)", "fixed"),
        Wrong("A batch that is not full takes less", "fixed + each * len(batch)", "fixed + each * largest"),
        Wrong("That is how long they waited", "[free - t for t in batch]", "[start - t for t in batch]"),
        Wrong("These are points in time", "[free - t for t in batch]", "[free for t in batch]"),
        Wrong("", source="def batched(arrivals, largest, wait, fixed, each):\n    return [13, 12, 16]\n"),
    ],
    "admitted": [
        Wrong("The bucket is full at the beginning", "float(burst)", "0.0"),
        Wrong("The bucket begins with `burst` tokens", "float(burst)", "1.0"),
        Wrong(
            "The bucket holds `burst` tokens at most",
            "min(burst, tokens + (now - last) * rate)",
            "tokens + (now - last) * rate",
        ),
        Wrong(
            "A refused request takes nothing",
            "waits.append((1 - tokens) / rate)",
            "waits.append((1 - tokens) / rate)\n            tokens -= 1",
        ),
        Wrong("Parts of a token count", "tokens + (now - last) * rate", "tokens + int((now - last) * rate)"),
        Wrong("One whole token is enough", "tokens >= 1", "tokens > 1"),
        Wrong("A part of the token is there already", "(1 - tokens) / rate", "1 / rate"),
        Wrong("That is the time when it may come again", "(1 - tokens) / rate", "now + (1 - tokens) / rate"),
        Wrong("Those are tokens", "(1 - tokens) / rate", "1 - tokens"),
        Wrong(
            "That says who passes",
            "            waits.append(0.0)\n        else:\n            waits.append((1 - tokens) / rate)",
            "            waits.append(1.0)\n        else:\n            waits.append(0.0)",
        ),
        Wrong(
            "Counting in windows",
            source="""
def admitted(times, rate, burst):
    window, used, waits = times[0], 0, []
    for now in times:
        while now >= window + burst / rate:
            window, used = window + burst / rate, 0
        used += 1
        waits.append(0 if used <= burst else window + burst / rate - now)
    return waits
""",
        ),
        Wrong("", source="def admitted(times, rate, burst):\n    return [0, 1, 0.75, 0]\n"),
    ],
    "ingress": [
        Wrong("You repeat what is not safe", f"        {UNSAFE}\n            return 502, None\n", ""),
        Wrong("Whoever answered with a wrong seal", UNSAFE, 'if kind == "lost" and not safe:'),
        Wrong("A broken connection does not say", UNSAFE, 'if kind == "unsealed" and not safe:'),
        Wrong("Busy and refused have done nothing", UNSAFE, "if not safe:"),
        Wrong("A safe request may be repeated", UNSAFE, 'if kind in ("unsealed", "lost"):'),
        Wrong("You ask one replica only", "[:tries]", "[:1]"),
        Wrong("You deliver an answer whose seal is wrong", 'kind == "sealed"', 'kind in ("sealed", "unsealed")'),
        Wrong("You ask the busiest replica first", "key=load.get)", "key=load.get, reverse=True)"),
        Wrong("You ask in the order of `load`", "sorted(load, key=load.get)[:tries]", "list(load)[:tries]"),
        Wrong(
            "Ties go to the first in `load`",
            "sorted(load, key=load.get)",
            "sorted(load, key=lambda name: (load[name], name))",
        ),
        Wrong("503 says that nothing was done", "return 502, None", "return 503, None"),
        Wrong("Nothing unsafe can have run", "return 503, None", "return 502, None"),
        Wrong("You ask all of them", "[:tries]", ""),
        Wrong(
            "You ask the same replica again",
            source="""
def ingress(load, safe, tries):
    name = min(load, key=load.get)
    while tries:
        kind, body = yield name
        if kind == "sealed":
            return 200, body
        if not safe and kind not in ("busy", "refused"):
            return 502, None
        tries -= 1
    return 503, None
""",
        ),
        Wrong("", source='def ingress(load, safe, tries):\n    kind, body = yield "bee"\n    return 200, body\n'),
    ],
    "capacity": [
        Wrong("With one replica down the others are too busy", "/ busy_at_most) + 1", "/ busy_at_most)"),
        Wrong("These would be busy all the time", " / busy_at_most", ""),
        Wrong("To be less busy takes more replicas", "/ busy_at_most", "* busy_at_most"),
        Wrong("Waiting does not keep a replica busy", "service_ms", "latency_ms"),
        Wrong("That is how many are being worked on", "* latency_ms", "* service_ms"),
        Wrong("1,000 times too many in flight", "latency_ms / 1000", "latency_ms"),
        Wrong("The latency holds the work already", "* latency_ms", "* (latency_ms + service_ms)"),
        Wrong("One replica may be down", "up**replicas + replicas * (1 - up) * up ** (replicas - 1)", "up**replicas"),
        Wrong("All down at once is rarer", MINUTES, "(1 - up) ** replicas * 43_200"),
        Wrong("Any two of them may be down", MINUTES, "(1 - up) ** 2 * 43_200"),
        Wrong("Pairs count three at once", MINUTES, "replicas * (replicas - 1) / 2 * (1 - up) ** 2 * 43_200"),
        Wrong(
            "That is exactly two down",
            MINUTES,
            "replicas * (replicas - 1) / 2 * (1 - up) ** 2 * up ** (replicas - 2) * 43_200",
        ),
        Wrong("Those are minutes of a day", "30 * 24 * 60", "24 * 60"),
        Wrong("Those are hours", "30 * 24 * 60", "30 * 24"),
        Wrong("", source="replicas, in_flight, minutes = 4, 12.0, 30.0\n"),
    ],
}
