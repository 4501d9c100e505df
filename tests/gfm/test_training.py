"""What is refused before a GFM training reads or computes anything."""

from __future__ import annotations

import pytest

from ragkit.config import GFMFinetuneConfig
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.settings import ConfigError


def test_a_ranker_that_takes_no_k_is_refused_before_the_data_is_read():
    config = GFMFinetuneConfig(datasets={"train_names": ["nowhere"]}, doc_ranker={"name": "idf", "top_k": 5})
    with pytest.raises(ConfigError, match=r"doc_ranker.top_k: ranker 'idf' takes no k, found 5; leave it out"):
        GFMFinetuneTrainer(config, encoder=object())
