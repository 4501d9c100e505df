"""The small LSR trainings with refreshed candidates that test_lsr_refresh.py runs, here and in processes it kills.

The retriever is a real one with weights, small enough that a step takes milliseconds: a bag of word vectors.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ragkit.config import LSRConfig, RAGConfig
from ragkit.rag import Generator, MemoryStore, Passage, RAGSystem
from ragkit.runs import Run
from ragkit.tuning import teacher
from ragkit.tuning.lsr import LSRTrainer

PLACES = "Peru Ghana Norway Japan Kenya Chile Latvia Qatar Cuba Fiji Nepal Oman".split()
WORDS = "capital food river king coast market".split()
STEPS = 9


class Words(nn.Module):
    """Embeds a text as the mean of a vector for each of its words."""

    def __init__(self, vocabulary, dim=12):
        super().__init__()
        self.number = {word: i for i, word in enumerate(sorted(vocabulary))}
        self.vectors = nn.Parameter(torch.randn(len(self.number), dim))
        self.mix = nn.Linear(dim, dim)

    def forward(self, texts):
        rows = [self.vectors[[self.number[w] for w in text.split() if w in self.number]].mean(0) for text in texts]
        return nn.functional.normalize(self.mix(torch.stack(rows)), dim=-1)  # [B, D]


class WordRetriever:
    """A `TrainableRetriever` of one encoder over a memory store."""

    cosine_scores = True
    stale = False

    def __init__(self, passages):
        torch.manual_seed(3)
        self.passages = passages
        self.encoder = Words({word for passage in passages for word in passage.text.split()})
        self.question_encoder = self.encoder
        self.store, self.built = MemoryStore(), 0
        self.refresh()

    def retrieve(self, questions, top_k):
        with torch.no_grad():
            return self.store.search(self.question_encoder(questions), top_k)

    def trainable_modules(self, part):
        modules = {"question": self.question_encoder}
        return modules if part == "query" else {**modules, "passage": self.encoder}

    def separate_query_encoder(self):
        if self.question_encoder is self.encoder:
            state = self.encoder.state_dict()
            self.question_encoder = Words(self.encoder.number)
            self.question_encoder.load_state_dict(state)
            return True
        return False

    def score(self, questions, passage_ids, part="query"):
        unique = list(dict.fromkeys(p for ids in passage_ids for p in ids))
        if part == "both":
            vectors = self.encoder([passage.text for passage in self.store.get(unique)])
        else:
            vectors = self.store.embeddings(unique)
        cosines = self.question_encoder(questions) @ vectors.t()  # [B, U]
        out = cosines.new_full((len(questions), max(map(len, passage_ids))), -torch.inf)
        for row, ids in enumerate(passage_ids):
            out[row, : len(ids)] = cosines[row, [unique.index(p) for p in ids]]
        return out

    def mark_stale(self):
        self.stale = True

    def refresh(self):
        new = MemoryStore()
        with torch.no_grad():
            new.add(self.passages, self.encoder([passage.text for passage in self.passages]))
        self.store, self.stale, self.built = new, False, self.built + 1


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *PLACES, *WORDS, "What", "is", "the", "of", "?", ":", "Answer", "yes"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_system():
    from transformers import LlamaConfig, LlamaForCausalLM

    passages = [Passage(f"{p}-{w}", f"the {w} of {p}" + " yes" * (len(p) % 4)) for p in PLACES for w in WORDS]
    tok = tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), initializer_range=0.5, **sizes, **special)).eval()
    config = RAGConfig(prompt="plain", device="cpu", max_new_tokens=4)
    return RAGSystem(WordRetriever(passages), Generator(model, tokenizer=tok, device="cpu", max_new_tokens=4), config)


def questions():
    return [
        {"id": f"{place}-{word}", "question": f"the {word} of {place}", "answer": f"{place} {word}"}
        for place in PLACES
        for word in WORDS[:2]
    ]


def settings(folder, name="run", **changes):
    train = {
        "batch_size": 5,
        "learning_rate": 0.03,
        "max_steps": STEPS,
        "warmup_steps": 0,
        "save_steps": 2,
        "num_threads": 1,
        "save_total_limit": 9,
        **changes.pop("train", {}),
    }
    values = {"top_k": 4, "refresh_steps": 3, "output_dir": str(folder), "name": name, "gamma": 0.1}
    return LSRConfig(**{**values, "score_batch_size": 7, **changes}, train=train)


def make_trainer(config, run=None, **options):
    return LSRTrainer(make_system(), questions(), config, run=run, **options)


def hang_while(what):
    """Waits to be killed: "saving" the second refresh half-written, or "scoring" it."""
    if what == "saving":
        save = teacher.save_file

        def half(tensors, path):
            save(tensors, path)
            if ".step-6." in str(path):
                data = Path(path).read_bytes()
                Path(path).write_bytes(data[: len(data) // 2])
                wait()

        teacher.save_file = half
    else:
        ask, calls = Generator.sequence_logprob, []

        def slow(*args, on_batch, **options):
            calls.append(1)  # the initial rows, then the two refreshes

            def after(*batch):
                on_batch(*batch)
                if len(calls) == 3:
                    wait()

            return ask(*args, on_batch=after, **options)

        Generator.sequence_logprob = slow


def wait():
    Path(os.environ["REACHED"]).touch()
    time.sleep(600)


if __name__ == "__main__":
    if os.environ.get("HANG_WHILE"):
        hang_while(os.environ["HANG_WHILE"])
    folder, part = sys.argv[1:]
    make_trainer(settings(Path(folder).parent, Path(folder).name, train_part=part), Run.open(folder)).train()
