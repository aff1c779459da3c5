"""Parameter shapes of models that people train, from their published configurations."""

Shapes = list[tuple[int, ...]]


def bert(layers: int, hidden: int) -> Shapes:
    """BERT encoder with pooler (arXiv 1810.04805): vocabulary 30,522, 512 positions, 2 segments."""
    norm: Shapes = [(hidden,), (hidden,)]
    linear: Shapes = [(hidden, hidden), (hidden,)]
    feed_forward: Shapes = [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    embeddings: Shapes = [(30522, hidden), (512, hidden), (2, hidden), *norm]
    return embeddings + (linear * 4 + norm + feed_forward + norm) * layers + linear


SHAPES: dict[str, Shapes] = {
    "bert-base": bert(12, 768),
    "bert-large": bert(24, 1024),
    "400-tiny": [(64,)] * 400,
}
