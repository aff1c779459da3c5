"""Parameter shapes of models that people train, from their published configurations."""

Shapes = list[tuple[int, ...]]


def bert(layers: int, hidden: int) -> Shapes:
    """BERT encoder with pooler (arXiv 1810.04805): vocabulary 30,522, 512 positions, 2 segments."""
    norm: Shapes = [(hidden,), (hidden,)]
    linear: Shapes = [(hidden, hidden), (hidden,)]
    feed_forward: Shapes = [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    embeddings: Shapes = [(30522, hidden), (512, hidden), (2, hidden), *norm]
    return embeddings + (linear * 4 + norm + feed_forward + norm) * layers + linear


def vit(layers: int, hidden: int, patch: int) -> Shapes:
    """Vision transformer for 224 x 224 images and 1,000 classes (arXiv 2010.11929)."""
    norm: Shapes = [(hidden,), (hidden,)]
    attention: Shapes = [(3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    feed_forward: Shapes = [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    embeddings: Shapes = [(1, 1, hidden), (1, (224 // patch) ** 2 + 1, hidden), (hidden, 3, patch, patch), (hidden,)]
    return embeddings + (norm + attention + norm + feed_forward) * layers + norm + [(1000, hidden), (1000,)]


def gpt2(layers: int, hidden: int) -> Shapes:
    """GPT-2 (Radford et al., 2019): vocabulary 50,257, 1,024 positions, output weights tied."""
    norm: Shapes = [(hidden,), (hidden,)]
    attention: Shapes = [(hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    feed_forward: Shapes = [(hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    return [(50257, hidden), (1024, hidden), *((norm + attention + norm + feed_forward) * layers), *norm]


def llama(layers: int, hidden: int, feed_forward: int) -> Shapes:
    """LLaMA (arXiv 2302.13971): vocabulary 32,000, no biases, output weights of their own."""
    layer: Shapes = [(hidden, hidden)] * 4 + [(feed_forward, hidden)] * 2 + [(hidden, feed_forward), (hidden,), (hidden,)]
    return [(32000, hidden), *(layer * layers), (hidden,), (32000, hidden)]


SHAPES: dict[str, Shapes] = {
    "bert-base": bert(12, 768),
    "bert-large": bert(24, 1024),
    "vit-large": vit(24, 1024, 16),
    "gpt2": gpt2(12, 768),
    "llama-7b, 4 of 32 layers": llama(4, 4096, 11008),
    "400-tiny": [(64,)] * 400,
}
