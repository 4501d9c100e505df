"""ragkit's hot loops as pure functions of tensors: each op has a folder with a plain PyTorch reference.

`linear_logprob.token_logprobs`: log-probabilities of given tokens without the whole logit matrix.
`lsr_loss.lsr_loss`: the KL divergence that trains a retriever from a language model's scores,
from the retriever's scores or (`lsr_loss_from_embeddings`) from its embeddings.

The package needs torch and knows nothing of ragkit. Import the ops one by one: `import ragkit_kernels` costs nothing.
"""

from __future__ import annotations
