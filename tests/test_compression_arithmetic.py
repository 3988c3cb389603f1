"""The arithmetic coder: bits come back, they cost what the chances say, and every machine has the same tables."""

import decimal
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_course.compression import arithmetic
from bigmodel_course.compression.arithmetic import NAT, ONE, Decoder, Encoder, Mixer

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, ONE - 1)), max_size=300)


@pytest.mark.verifies(
    "compression.arithmetic.Encoder",
    "compression.arithmetic.Decoder",
    kind="invariant",
    against="the bits coded",
    on="any bits with any chances, also very unlikely ones",
)
@given(BITS)
def test_bits_come_back(pairs):
    encoder = Encoder()
    for bit, chance in pairs:
        encoder.code(bit, chance)
    decoder = Decoder(encoder.finish())
    assert [decoder.code(0, chance) for _, chance in pairs] == [bit for bit, _ in pairs]
    decoder.finish()


@pytest.mark.verifies(
    "compression.arithmetic.Encoder",
    kind="parity",
    against="Shannon: -log2(chance) bits each; excess in bits",
    on="20,000 bits with chances from 1 / 65536 to 65535 / 65536",
    bound=24.0,
)
def test_a_bit_costs_what_its_chance_says(seen):
    dice, encoder = random.Random(0), Encoder()
    for _ in range(20_000):
        chance = min(max(int(ONE * dice.random() ** 4), 1), ONE - 1)
        encoder.code(int(dice.random() * ONE < chance), chance)
    seen(8 * len(encoder.finish()) - sum(encoder.costs.values()))


@pytest.mark.verifies(
    "compression.arithmetic.Decoder",
    kind="message",
    against="ValueError",
    on="bytes that end too early, bytes left over",
)
def test_too_few_or_too_many_bytes_are_refused():
    def read(data):
        decoder = Decoder(data)
        for _ in range(400):
            decoder.code(0, ONE // 2)
        decoder.finish()

    encoder = Encoder()
    for i in range(400):
        encoder.code(i % 3 % 2, ONE // 2)
    data = encoder.finish()
    with pytest.raises(ValueError, match="end too early"):
        read(data[:20])
    for wrong in (data + b"more", data + b"\0", data[:-1]):
        with pytest.raises(ValueError, match=r"do not end where the last bit does|end too early"):
            read(wrong)


@pytest.mark.verifies(
    "compression.arithmetic.Mixer",
    kind="invariant",
    against="the bits coded",
    on="any bits, contexts and known log-odds",
)
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(-3000, 3000)), max_size=200))
def test_reader_and_writer_learn_the_same(steps):
    encoder, one, other = Encoder(), Mixer([0.5, 0.1], [4]), Mixer([0.5, 0.1], [4])
    for bit, context, known in steps:
        one.code(encoder, bit, [context], [known])
    decoder = Decoder(encoder.finish())
    assert [other.code(decoder, 0, [c], [known]) for _, c, known in steps] == [bit for bit, _, _ in steps]


@pytest.mark.verifies(
    "compression.arithmetic.Mixer",
    kind="invariant",
    against="the entropy of a source that depends on one of two contexts; excess in bits a bit",
    on="5,000 bits, chance 0.02 or 0.9 by the first context, the second one noise",
    bound=0.1,
)
def test_the_mixer_finds_the_context_that_counts(seen):
    dice, encoder, mixer = random.Random(1), Encoder(), Mixer([0.3, 0.3], [2, 8])
    entropy = 0.0
    for _ in range(5_000):
        context = dice.randrange(2)
        chance = (0.02, 0.9)[context]
        entropy -= chance * math.log2(chance) + (1 - chance) * math.log2(1 - chance)
        mixer.code(encoder, int(dice.random() < chance), [context, dice.randrange(8)], [])
    seen((8 * len(encoder.finish()) - entropy) / 5_000)


def test_every_machine_rounds_the_tables_alike():
    """An entry nearer than 1e-6 to a half could be rounded differently by another machine's logarithm."""
    with decimal.localcontext(prec=30):
        half, nat = decimal.Decimal("0.5"), decimal.Decimal(NAT)
        cases = [(arithmetic.STRETCH[i], nat * ((i + half) / (ONE - i - half)).ln()) for i in range(0, ONE, 7)]
        cases += [
            (y, min(max(ONE / (1 + (-decimal.Decimal(i - arithmetic.FAR) / nat).exp()), decimal.Decimal(1)), ONE - 1))
            for i, y in enumerate(arithmetic.SQUASH)
        ]
        assert all(abs(exact - entry) < half - decimal.Decimal("1e-6") for entry, exact in cases)
