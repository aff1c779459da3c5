"""Datasets of arrays and of Python objects, as far as scripts need them to run. For anything more give `Model` a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torchlamb.mindspore.checks import check_count
from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.options import fail

__all__ = ["Dataset", "GeneratorDataset", "NumpySlicesDataset"]

Row = tuple[Any, ...]


class Dataset:
    """Rows of columns; each method returns a new dataset.

    Args:
        rows: a function that returns an iterator over one epoch
        size: the number of rows, None where it is not known
        columns: their names
    """

    def __init__(self, rows: Callable[[], Iterator[Row]], size: int | None, columns: Sequence[str]) -> None:
        self._rows, self._size, self.column_names = rows, size, list(columns)

    def __iter__(self) -> Iterator[Row]:
        return (tuple(wrap(torch.as_tensor(plain(x))) for x in row) for row in self._rows())

    def get_dataset_size(self) -> int:
        """Return the number of rows, which are batches after `batch`."""
        if self._size is None:
            self._size = sum(1 for _ in self._rows())
        return self._size

    def __len__(self) -> int:
        return self.get_dataset_size()

    def get_col_names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.column_names)

    def batch(self, batch_size: int, drop_remainder: bool = False, **ignored: Any) -> Dataset:  # noqa: ARG002
        """Return a dataset of batches; with `drop_remainder` without a last smaller one.

        Raises:
            TypeError, ValueError: `batch_size` is no int >= 1
        """
        check_count("batch_size", batch_size)

        def rows() -> Iterator[Row]:
            held: list[Row] = []
            for row in self._rows():
                held.append(row)
                if len(held) == batch_size:
                    yield _stacked(held)
                    held = []
            if held and not drop_remainder:
                yield _stacked(held)

        size = None if self._size is None else self._size // batch_size if drop_remainder else -(-self._size // batch_size)
        return Dataset(rows, size, self.column_names)

    def repeat(self, count: int | None = None) -> Dataset:
        """Return a dataset that is this one so many times; -1 and None are refused, as nothing here reads without end.

        Raises:
            TypeError, ValueError: `count` is no int >= 1
        """
        check_count("count", count)
        size = None if self._size is None else self._size * int(count or 1)
        return Dataset(lambda: (row for _ in range(int(count or 1)) for row in self._rows()), size, self.column_names)

    def shuffle(self, buffer_size: int | None = None) -> Dataset:  # noqa: ARG002
        """Return a dataset whose rows come in another order in each epoch, of torch's generator."""

        def rows() -> Iterator[Row]:
            held = list(self._rows())
            return (held[i] for i in torch.randperm(len(held), device="cpu").tolist())

        return Dataset(rows, self._size, self.column_names)

    def map(self, operations: Any, input_columns: Any = None, **ignored: Any) -> Dataset:  # noqa: ARG002
        """Return a dataset in which a function, or each of a list of them, has been called with some columns.

        Raises:
            ValueError: a column that is not there
        """
        functions = [operations] if callable(operations) else list(operations)
        chosen = [input_columns] if isinstance(input_columns, str) else list(input_columns or self.column_names[:1])
        for name in chosen:
            if name not in self.column_names:
                raise fail(ValueError, "input_columns", f"of {', '.join(self.column_names)}", name)
        places = [self.column_names.index(name) for name in chosen]

        def changed(row: Row) -> Row:
            values: Any = tuple(row[i] for i in places)
            for function in functions:
                values = function(*values)
                values = values if isinstance(values, tuple) else (values,)
            now = dict(zip(places, values, strict=True))
            return tuple(now.get(i, x) for i, x in enumerate(row))

        return Dataset(lambda: map(changed, self._rows()), self._size, self.column_names)

    def create_tuple_iterator(self, num_epochs: int = 1, output_numpy: bool = False, **ignored: Any) -> Iterator[Any]:  # noqa: ARG002
        """Return an iterator over one epoch that yields lists of tensors, or of arrays."""
        return ([x.asnumpy() if output_numpy else x for x in row] for row in self)

    def create_dict_iterator(self, num_epochs: int = 1, output_numpy: bool = False, **ignored: Any) -> Iterator[Any]:
        """Return an iterator over one epoch that yields dicts from names of columns to tensors, or to arrays."""
        rows = self.create_tuple_iterator(num_epochs, output_numpy, **ignored)
        return (dict(zip(self.column_names, row, strict=True)) for row in rows)

    def reset(self) -> None:
        """Do nothing; each epoch begins anew."""


class GeneratorDataset(Dataset):
    """Rows of a Python object.

    Args:
        source: what has ``len()`` and is indexed, an iterable, or a function that returns an iterator; each row is a tuple of
            arrays or numbers, or one
        column_names: a list of names, or one
        shuffle: another order in each epoch, of what is indexed; None for True (default: None)
        ignored: further words of the original, which do nothing

    Raises:
        TypeError: a source of another type

    Example:
        >>> from torchlamb.mindspore.dataset import GeneratorDataset
        >>> rows = [([0.0, 1.0], 0), ([1.0, 0.0], 1), ([1.0, 1.0], 2)]
        >>> dataset = GeneratorDataset(rows, ["data", "label"], shuffle=False).batch(2)
        >>> dataset.get_dataset_size(), [label.asnumpy().tolist() for _, label in dataset]
        (2, [[0, 1], [2]])

    Source: `mindspore.dataset.GeneratorDataset`.
    """

    def __init__(self, source: Any, column_names: Any = None, shuffle: bool | None = None, **ignored: Any) -> None:  # noqa: ARG002
        names = [column_names] if isinstance(column_names, str) else list(column_names or ["data"])
        indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if not indexed and not callable(source) and not isinstance(source, Iterable):
            raise fail(
                TypeError, "source", "what is indexed, an iterable, or a function that returns an iterator", type(source)
            )

        def rows() -> Iterator[Row]:
            if not indexed:
                return map(_row, source() if callable(source) else source)
            count = len(source)
            order = range(count) if shuffle is False else torch.randperm(count, device="cpu").tolist()
            return (_row(source[i]) for i in order)

        super().__init__(rows, len(source) if indexed else None, names)


class NumpySlicesDataset(GeneratorDataset):
    """Rows of arrays.

    Args:
        data: a dict from names to arrays, a tuple or list of arrays, or one array
        column_names: where `data` is no dict (default: None)
        shuffle: another order in each epoch; None for True (default: None)
        ignored: further words of the original, which do nothing

    Raises:
        ValueError: arrays of different lengths

    Example:
        >>> from torchlamb.mindspore.dataset import NumpySlicesDataset
        >>> NumpySlicesDataset({"data": [[1.0], [2.0]], "label": [0, 1]}).batch(2).get_dataset_size()
        1

    Source: `mindspore.dataset.NumpySlicesDataset`.
    """

    def __init__(self, data: Any, column_names: Any = None, shuffle: bool | None = None, **ignored: Any) -> None:
        columns = (
            list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, (tuple, list)) else [data]
        )
        names = list(data) if isinstance(data, Mapping) else column_names or [f"column_{i}" for i in range(len(columns))]
        if len({len(column) for column in columns}) > 1:
            raise fail(ValueError, "data", "arrays of one length", [len(column) for column in columns])
        super().__init__(list(zip(*columns, strict=True)), names, shuffle, **ignored)


def _row(row: Any) -> Row:
    return tuple(row) if isinstance(row, (tuple, list)) else (row,)


def _stacked(rows: Sequence[Row]) -> Row:
    return tuple(torch.stack([torch.as_tensor(plain(x)) for x in column]) for column in zip(*rows, strict=True))
