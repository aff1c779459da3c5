"""Text -> token ids -> masked sequences. What comes out depends on the text, the seed and the sample's number alone."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASKED_SHARE = 0.15  # of a sequence's tokens; of those, 80 % become [MASK], 10 % another token, 10 % stay (arXiv 1810.04805)
HELD_OUT_SHARE = 0.01  # of the sequences
IGNORED = -100


class CorpusError(Exception):
    """What is wrong with a corpus, and what to do."""


@dataclass(frozen=True)
class Corpus:
    """All token ids of a text, without special tokens."""

    ids: Tensor  # (tokens,) int32
    tokenizer: Tokenizer
    digest: str  # of text and tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def unigram_loss(self) -> float:
        """Return the loss, in nats, of what only knows how often each token comes: the plateau that training has to leave."""
        counts = torch.bincount(self.ids, minlength=self.vocab_size).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


def load(names: Sequence[str], vocab_size: int, cache: Path) -> Corpus:
    """Return a corpus from the cache, or tokenize it and put it there.

    Args:
        names: "stdlib", "hf:NAME" or "hf:NAME:CONFIG" of a dataset with a text column, or files and folders
        vocab_size: of the tokenizer, which is trained on the corpus
        cache: a folder, which is made where it is missing
    """
    documents = [document for name in names for document in _documents(name)]
    if not any(document.strip() for document in documents):
        raise CorpusError(
            f"--corpus {' '.join(names)} has no text; name files with some, or leave it out for Python's own source"
        )
    hashed = hashlib.sha256(f"1 {vocab_size}".encode())
    for document in documents:
        hashed.update(len(document).to_bytes(8, "little") + document.encode("utf-8", "surrogateescape"))
    digest = hashed.hexdigest()[:16]
    ids_file, tokenizer_file = cache / f"{digest}.pt", cache / f"{digest}.json"
    if not (ids_file.exists() and tokenizer_file.exists()):
        print(f"Tokenizing {sum(map(len, documents)) / 1e6:.1f} M characters into {cache} (once)", flush=True)
        tokenizer = train_tokenizer(documents, vocab_size)
        ids = [i for encoded in tokenizer.encode_batch_fast(documents, add_special_tokens=False) for i in encoded.ids]
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(tokenizer_file, lambda path: tokenizer.save(str(path)))
        write_whole(ids_file, lambda path: torch.save(torch.tensor(ids, dtype=torch.int32), path))
    return cached(digest, cache)


def cached(digest: str, cache: Path) -> Corpus:
    ids = torch.load(cache / f"{digest}.pt", weights_only=True)
    return Corpus(ids, Tokenizer.from_file(str(cache / f"{digest}.json")), digest)


def _documents(name: str) -> Iterator[str]:
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & set(f.parts)]
    elif name.startswith("hf:"):
        yield from _hub_texts(name)
        return
    elif Path(name).is_file():
        files = [Path(name)]
    elif Path(name).is_dir():
        files = sorted(f for f in Path(name).rglob("*") if f.is_file() and not f.name.startswith("."))
    else:
        raise CorpusError(f"--corpus {name} is no file and no folder; name one, or stdlib, or hf:NAME for a dataset of the hub")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise CorpusError(
                f"--corpus {name}: {file} cannot be read ({error.strerror}); mend that, or leave it out"
            ) from error


def _hub_texts(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CorpusError(f"--corpus {name} needs the datasets package: pip install datasets") from error
    _, dataset, *config = name.split(":")
    try:
        rows = load_dataset(dataset, *config, split="train")
    except Exception as error:
        raise CorpusError(f"--corpus {name} cannot be had: {error}") from error
    if "text" not in rows.column_names:
        raise CorpusError(
            f"--corpus {name} has columns {', '.join(rows.column_names)} and none is called text; name another one"
        )
    yield from rows["text"]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


class MaskedSequences(Dataset):
    """The training samples, numbered from 0 without end: an epoch's random order of all sequences, then the next epoch's.

    A sample is input ids (length,) int64, the places (masked,) of what is to be predicted, and the ids (masked,) there.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, held_out: bool = False) -> None:
        self.corpus, self.length, self.seed = corpus, length, seed
        content = length - 2
        whole = len(corpus.ids) // content
        self.held_out = max(1, round(HELD_OUT_SHARE * whole))
        self.count = self.held_out if held_out else whole - self.held_out
        if self.count < 1:
            raise CorpusError(
                f"--corpus has {len(corpus.ids)} tokens, too few for two sequences of --seq-len {length}; give more text, or a "
                "smaller --seq-len"
            )
        # Which sequences are held out does not follow from the seed: no run has seen those of another.
        shuffled = torch.randperm(whole, generator=torch.Generator().manual_seed(0))
        self.sequences = shuffled[: self.held_out] if held_out else shuffled[self.held_out :]
        self.is_held_out = held_out
        self.masked = max(1, round(MASKED_SHARE * content))
        self.cls, self.sep, self.mask = (corpus.tokenizer.token_to_id(token) for token in (CLS, SEP, MASK))
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        content = self.length - 2
        start = int(self.sequences[self._place(number)]) * content
        original = self.corpus.ids[start : start + content].long()
        generator = torch.Generator().manual_seed(hash_of(self.seed, self.length, self.is_held_out, number))
        places = torch.randperm(content, generator=generator)[: self.masked]
        fate = torch.rand(self.masked, generator=generator)
        other = torch.randint(len(SPECIAL), self.corpus.vocab_size, (self.masked,), generator=generator)
        targets = original[places]
        ids = original.clone()
        ids[places] = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, other, targets))
        ids = torch.cat([torch.tensor([self.cls]), ids, torch.tensor([self.sep])])
        return ids, places + 1, targets

    def _place(self, number: int) -> int:
        epoch, index = divmod(number, self.count)
        if self.is_held_out:
            return index
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hash_of(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[index])


class Share:
    """A batch sampler: which samples one process takes, micro-batch by micro-batch, from step `first` to step `last`.

    The samples of a step are the same whatever the number of processes, and where a run begins again is one number: that is all
    the state there is.
    """

    def __init__(self, first: int, last: int, batch_size: int, micro_batch_size: int, rank: int, processes: int) -> None:
        self.steps, self.batch_size, self.micro_batch_size = range(first, last), batch_size, micro_batch_size
        self.rank, self.own = rank, batch_size // processes

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            begin = step * self.batch_size + self.rank * self.own
            for start in range(begin, begin + self.own, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return len(self.steps) * self.own // self.micro_batch_size


def hash_of(*numbers: int) -> int:
    """Return a seed that follows from numbers."""
    return int.from_bytes(hashlib.blake2b(json.dumps(numbers).encode(), digest_size=7).digest(), "little")


def write_whole(path: Path, write) -> None:
    """Write a file under another name, sync it, and rename it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
