"""Two tasks on text: an LSTM reads sentences that are padded to one length. Run: python docs/examples/text_lstm.py

The sentences are made here. For your own text, put your tokenizer in the place of `encode`.
"""

import random
from dataclasses import dataclass

import torch
from torch import nn

import mtl
from mtl.data import Benchmark, Tokens, from_dataset
from mtl.tasks import Classification

LENGTH = 12
GOOD, BAD = "great lovely fine superb", "awful dull poor bad"
TOPICS = {"film": "actor scene plot", "food": "soup bread chef", "trip": "hotel beach train"}
WORDS = ["<pad>", *" ".join(["the was and very a", GOOD, BAD, *TOPICS.values()]).split()]


def sentences(count: int, seed: int) -> list[dict]:
    """{"text", "topic", "positive"}; every third sentence has no opinion label."""
    draw, items = random.Random(seed), []
    for i in range(count):
        topic, positive = draw.randrange(3), draw.randrange(2)
        noun = draw.choice(list(TOPICS.values())[topic].split())
        opinion = draw.choice((GOOD if positive else BAD).split())
        text = draw.choice((f"the {noun} was {opinion}", f"a very {opinion} {noun} and the {noun} was very {opinion}"))
        items.append({"text": text, "topic": topic, "positive": positive if i % 3 else None})
    return items


def encode(text: str) -> torch.Tensor:
    """(LENGTH,) the words' numbers, 0 after the end."""
    found = [WORDS.index(word) for word in text.split()][:LENGTH]
    return torch.tensor(found + [0] * (LENGTH - len(found)))


@dataclass
class Sentences(Benchmark):
    tasks = (Classification("topic", 3), Classification("positive", 2))
    inputs = {"words": Tokens(LENGTH, len(WORDS))}

    def load(self):
        columns = {"words": lambda item: encode(item["text"]), "topic": "topic", "positive": "positive"}
        return {
            name: from_dataset(sentences(n, seed), columns) for name, n, seed in (("train", 400, 0), ("test", 100, 1))
        }


class Reader(nn.Module):
    inputs = ("words",)
    out_features = 32

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16, padding_idx=0)
        self.lstm = nn.LSTM(16, self.out_features, batch_first=True)

    def forward(self, words):
        lengths = (words > 0).sum(1)
        states, _ = self.lstm(self.embedding(words))
        return states[torch.arange(len(words), device=words.device), (lengths - 1).clamp(min=0)]  # at the last word


def main():
    # The options of digits are those of every data set, and resnet20 has one option that Reader lacks, its depth.
    result = mtl.train(
        "data=digits", "data._target_=text_lstm.Sentences", "arch._target_=text_lstm.Reader", "~arch.depth",
        "loss=uncertainty", "optimizer=adam", "logger=none", seed=0, trainer={"epochs": 4}, optimizer={"lr": 0.02},
    )  # fmt: skip
    print(result.summary["last"])
    return result


if __name__ == "__main__":
    main()
