"""Make random samples of realistic sizes, where there are no data or their content is of no use."""

import numpy as np

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import Example

MASKED = 0.15  # share of words and of regions that are targets; at least one of each


def random_examples(
    sizes: ModelConfig,
    samples: int,
    words: tuple[int, int] = (12, 16),
    regions: tuple[int, int] = (36, 36),
    seed: int = 0,
) -> list[Example]:
    """Return samples of `words` (from, to) tokens and `regions` (from, to) boxes, every second one
    mismatched.
    """
    random = np.random.default_rng(seed)
    examples = []

    for number in range(samples):
        count, boxes = (int(random.integers(low, high + 1)) for low, high in (words, regions))
        ids = random.integers(0, sizes.vocab_size, count)
        positions = np.sort(
            random.choice(np.arange(1, count - 1), max(1, round(MASKED * count)), replace=False)
        )
        hidden = np.zeros(boxes, bool)
        hidden[random.choice(boxes, max(1, round(MASKED * boxes)), replace=False)] = True
        examples.append(
            Example(
                token_ids=ids,
                token_types=np.zeros(count, np.int64),
                features=random.normal(size=(boxes, sizes.feature_dim)).astype(np.float16),
                locations=random.uniform(size=(boxes, 5)).astype(np.float32),
                class_ids=random.integers(0, sizes.num_classes, (boxes, 1)),
                class_probs=np.ones((boxes, 1), np.float32),
                hidden_regions=hidden,
                msm_positions=positions,
                msm_labels=ids[positions],
                mismatched=number % 2,
            )
        )

    return examples
