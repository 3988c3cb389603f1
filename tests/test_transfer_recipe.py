"""The division of the glosses and the ways to tune them are what lesson 32 says they are."""

import pytest
import torch

from bigmodel_course.data import Dataset
from bigmodel_course.transfer import text
from bigmodel_course.transfer.encoder import PAD, TextClassifier
from bigmodel_course.transfer.finetune import trained_parameters
from bigmodel_course.transfer.lora import adapters
from bigmodel_course.transfer.recipe import RATES, classifier, few, gloss_parts, right, tune_
from bigmodel_course.transfer.text import glosses, train_start

verifies = pytest.mark.verifies


@pytest.fixture(scope="module")
def start():
    return train_start(steps=20)


@pytest.fixture(scope="module")
def parts(start):
    return gloss_parts(start.tokenizer)


@verifies(
    "transfer.recipe.gloss_parts",
    "transfer.recipe.few",
    kind="invariant",
    against="1,228 glosses, no sentence in two parts, the same at each call",
    on="three parts, and 50 labels a class drawn by three seeds",
    bound=0,
)
def test_the_parts_are_balanced_and_share_no_sentence(parts, start, seen):
    assert [len(part) for part in parts] == [368, 246, 614]
    assert all(abs(int(bad - good)) <= 2 for bad, good in (part.y.bincount() for part in parts))
    every_word = text._word_tokenizer(2 * glosses()[0])  # no [UNK], so that sentences can be told apart
    known = gloss_parts(every_word)
    assert all(torch.equal(a.y, b.y) for a, b in zip(parts, known, strict=True)), "whatever the tokenizer"
    rows = [{tuple(row.tolist()) for row in part.x} for part in known]
    seen(len(rows[0] & rows[1]) + len(rows[0] & rows[2]) + len(rows[1] & rows[2]))
    again = gloss_parts(start.tokenizer)
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts, again, strict=True))
    drawn = [few(parts[0], 50, seed=seed) for seed in (0, 0, 1)]
    assert all(one.y.bincount().tolist() == [50, 50] for one in drawn)
    assert torch.equal(drawn[0].x, drawn[1].x)
    assert not torch.equal(drawn[0].x, drawn[2].x)
    positions = few(Dataset(torch.arange(len(parts[0])), parts[0].y), 50, seed=0).x
    assert torch.equal(parts[0].x[positions], drawn[0].x), "the same rows whatever stands in them"


@verifies(
    "transfer.recipe.classifier",
    "transfer.recipe.RATES",
    "transfer.recipe.tune_",
    kind="invariant",
    against="the start, which stays as it is, and a second run, bitwise",
    on="each way to tune, two epochs",
    bound=0.0,
)
@pytest.mark.parametrize("way", RATES)
def test_each_way_trains_its_part_and_leaves_the_start_alone(way, start, parts, seen):
    before = {name: p.clone() for name, p in start.encoder.state_dict().items()}
    train, runs = few(parts[0], 10, seed=0), []
    for _ in range(2):
        model = classifier(start, way, seed=0)
        assert bool(adapters(model)) == (way == "LoRA")
        assert (trained_parameters(model) == sum(p.numel() for p in model.parameters())) == (way != "LoRA")
        own = model.encoder.embeddings["word_embeddings"].weight
        assert torch.equal(own, before["embeddings.word_embeddings.weight"]) == (way != "random")
        tune_(model, train, RATES[way], seed=0, epochs=2)
        assert torch.equal(own, before["embeddings.word_embeddings.weight"]) == (way == "LoRA")
        runs.append(model)
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        seen((a - b).abs().max().item())
    assert all(torch.equal(before[name], p) for name, p in start.encoder.state_dict().items())


@verifies(
    "transfer.recipe.right",
    kind="invariant",
    against="the share of right answers counted one sentence at a time",
    on="60 glosses of different lengths",
    bound=0.0,
)
def test_right_counts_each_sentence_once(start, parts, seen):
    model = TextClassifier(start.encoder, 2)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    part = parts[1][:60]
    with torch.no_grad():
        alone = [int(model(row[row != PAD][None]).argmax()) == label for row, label in zip(part.x, part.y, strict=True)]
    seen(abs(right(model, part) - sum(alone) / 60))


@verifies(
    "transfer.recipe.few",
    "transfer.recipe.classifier",
    kind="message",
    against="ValueError that names the argument and what came",
    on="too many labels, none, an unknown way",
)
def test_wrong_input_is_named(start, parts):
    for each in (0, 369):
        with pytest.raises(ValueError, match=f"each must be 1 to 18., what the rarest class has, got {each}"):
            few(parts[0], each, seed=0)
    with pytest.raises(ValueError, match="way must be one of LoRA, full, random, got 'half'"):
        classifier(start, "half", seed=0)
