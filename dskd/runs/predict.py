"""What a trained classifier says of the rows of a file: ``dskd predict``.

Shape letters: B rows, T tokens, C classes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.batch import IGNORE, UNLABELLED, Batch
from dskd.data.examples import examples
from dskd.data.labelled import EncodedExamples, ExampleEncoder
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.data.unpacking import PACKED_ENDINGS
from dskd.errors import ConfigError
from dskd.models.build import build
from dskd.models.families import positions_of
from dskd.models.frozen import evaluating
from dskd.runs.finding import model_at
from dskd.settings.data import Data, JsonlSource
from dskd.settings.labels import Columns, CsvSource, TsvSource
from dskd.settings.model import Model
from dskd.system.device import on_gpu
from dskd.system.files import write_atomic

_SOURCES: dict[str, type[CsvSource | TsvSource | JsonlSource]] = {
    "csv": CsvSource,
    "tsv": TsvSource,
    "jsonl": JsonlSource,
}
"""By the ending of a file's name, which is also the ``kind``."""

_ROWS = 4096  # encoded and sorted by length at a time


def main(words: Sequence[str]) -> int:
    """The command ``dskd predict RUN_OR_FOLDER FILE OUT``; returns the exit status.

    OUT gets a JSON line for each row of FILE: ``label`` and ``probabilities`` by class, or, of a
    model of numbers, ``number``.

    Raises:
        ConfigError: there is no model for classification, or FILE is of no kind that is read.
        DataError: a row of FILE makes no example; it is named.
        DiskError: OUT cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="dskd predict", description="Write a classifier's label and probabilities of each row."
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN_OR_FOLDER", help="a run's folder, or a model's"
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl, maybe .gz or .zst"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="JSON lines to write, one a row")
    parser.add_argument("--text", metavar="COLUMN", help="of the text (as the run has it, or text)")
    parser.add_argument("--pair", metavar="COLUMN", help="of a second text (as the run has it)")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="most tokens (the run's, or 512)"
    )
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="rows at a time (32)")
    options = parser.parse_args(words)
    folder, data = model_at(options.path, "predict")
    columns = {"field": options.text, "pair": options.pair}
    source = _source(options.file, data, {k: v for k, v in columns.items() if v is not None})
    size = options.block_size or (512 if data is None else data.block_size)
    lines = predict(folder, source, block_size=size, rows=options.rows)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(options.out, text.encode(), "the predictions")
    print(f"{text.count(chr(10))} rows: {options.out}")
    return 0


def predict(
    folder: Path, source: Columns, *, block_size: int, rows: int
) -> Iterator[dict[str, Any]]:
    """What the model in ``folder`` says of each example of a source, in its order.

    Args:
        block_size: most tokens of an example; what is beyond is cut.
        rows: of one forward pass.

    Raises:
        ConfigError: no model for classification lies there, or it has too few positions.
        DataError: a row makes no example.
    """
    tokenizer = stored_tokenizer(str(folder), "predict")
    device = torch.device("cuda" if on_gpu() else "cpu")
    how = {"seed": 0, "ds": None, "dtype": torch.float32, "where": "predict", "device": device}
    named = Model(path=str(folder))
    of = {"objective": "classification", "block_size": block_size}
    model = build(named, tokenizer, **of, **how).to(device)
    names = [model.config.id2label[n] for n in range(model.config.num_labels)]
    encode = ExampleEncoder(Data(**of), tokenizer, names)
    found = examples(source)
    with evaluating(model):
        while some := list(islice(found, _ROWS)):
            for said_C in _said(model, tokenizer, encode(some), rows):
                yield _line(said_C, names)


def _said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: EncodedExamples, rows: int
) -> NDArray[np.float64]:
    """Probabilities of the classes [R, C], or numbers [R, 1], of encoded examples."""
    order = np.argsort([len(row) for row in encoded.rows], kind="stable")
    device = next(model.parameters()).device
    parts = []
    for first in range(0, len(order), rows):
        batch = _batch(encoded, order[first : first + rows].tolist(), tokenizer.pad_token_id)
        with torch.no_grad():
            logits_BC = positions_of(model, batch.to(device)).logits_NV.double()
        parts.append((logits_BC if logits_BC.shape[1] == 1 else logits_BC.softmax(1)).cpu())
    said_RC = torch.cat(parts).numpy()
    return said_RC[np.argsort(order)]


def _batch(encoded: EncodedExamples, places: list[int], pad: int) -> Batch:
    """The examples at some places, each with one supervised position of no class."""
    rows = [torch.from_numpy(encoded.rows[place]) for place in places]
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    seconds_B1 = torch.tensor([[int(encoded.seconds_R[place])] for place in places])
    ids_BT: Tensor = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    places_T = torch.arange(ids_BT.shape[1])
    mask_BT = places_T < lengths_B1
    labels_BT = torch.full_like(ids_BT, IGNORE)
    labels_BT[:, 0] = UNLABELLED
    ids_B = torch.arange(len(rows))
    return Batch.of(
        row_ids_B=ids_B,
        domains_B=torch.zeros_like(ids_B),
        ids_BT=ids_BT,
        mask_BT=mask_BT.long(),
        labels_BT=labels_BT,
        types_BT=((places_T >= seconds_B1) & mask_BT).long(),
    )


def _line(said_C: NDArray[np.float64], names: Sequence[str]) -> dict[str, Any]:
    if len(said_C) == 1:
        return {"number": float(said_C[0])}
    probabilities = dict(zip(names, said_C.tolist(), strict=True))
    return {"label": names[int(said_C.argmax())], "probabilities": probabilities}


def _source(file: Path, data: Data | None, given: dict[str, str]) -> Columns:
    """What reads a file, by its columns as given, or as the run's first source has them."""
    name = file.stem if file.suffix in PACKED_ENDINGS else file.name
    ending = next((kind for kind in _SOURCES if name.endswith(f".{kind}")), None)
    if ending is None:
        endings = ", ".join(f".{kind}" for kind in _SOURCES)
        raise ConfigError(f"predict: {file} is none of {endings} (or one of them with .gz or .zst)")
    own = data.sources[0] if data is not None else None
    taken = {"field", "pair", "quoting", "columns"} & _SOURCES[ending].model_fields.keys()
    values = own.model_dump(include=taken) if isinstance(own, Columns) else {}
    return _SOURCES[ending](kind=ending, path=str(file), **(values | given))
