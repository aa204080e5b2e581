"""The command ``dskd convert``: a checkpoint of an original system becomes a HuggingFace folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dskd.convert import fairseq, gpt2, uer
from dskd.convert.check import refuse_short, report, text_of
from dskd.convert.converted import Converted, refuse_existing, write
from dskd.system.device import DTYPES


def main(words: Sequence[str]) -> int:
    """``dskd convert KIND PATH OUT``; returns the exit status.

    Raises:
        ConfigError: the file or an option is refused, or OUT exists; nothing is written.
        DataError: ``--text`` cannot be read or scored.
        DiskError: OUT cannot be written.
    """
    options = _parser().parse_args(words)
    refuse_existing(options.out)
    text = text_of(options.text)
    source, converted = options.convert(options)
    refuse_short(text, converted.tokenizer, converted.objective)
    write(converted, options.kind, source, options.out)
    print(f"{options.out}: converted from {source}")
    objective, written = converted.objective, converted.tokenizer is not None
    notes = converted.notes
    del converted  # or a large model would be in memory twice
    for line in [*notes, *report(options.out, objective, text, options.text, written)]:
        print(f"  {line}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dskd convert",
        description="Write a checkpoint of an original system as a HuggingFace folder. Nothing "
        "that lies in it is run.",
    )
    kinds = parser.add_subparsers(title="kinds", dest="kind", required=True, metavar="KIND")
    one = kinds.add_parser(
        "fairseq",
        help="a RoBERTa of fairseq (Knowledge Inheritance, ELLE)",
        description="A RoBERTa of fairseq. A file that a torch before 1.6 wrote is read whole, "
        "with its optimizer: about three times the model's fp32 size of memory.",
    )
    _common(one, "PATH.pt", _fairseq)
    one.add_argument("--dict", type=Path, metavar="dict.txt", help="the order of its tokens")
    one.add_argument("--bpe", type=Path, metavar="vocab.bpe", help="makes the tokenizer")
    one.add_argument("--tokenizer", metavar="FOLDER", help="in place of --bpe; must equal --dict")
    one.add_argument("--head", metavar="NAME", help="convert this head for classes, not the LM's")
    one.add_argument("--heads", type=int, metavar="N", help="attention heads, if it does not say")
    one.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")

    two = kinds.add_parser("uer", help="a BERT of UER-py", description="A BERT of UER-py.")
    _common(two, "PATH.bin", _uer)
    two.add_argument("--vocab", type=Path, required=True, metavar="vocab.txt")
    heads = two.add_mutually_exclusive_group()
    heads.add_argument("--config", type=Path, metavar="uer.json", help="UER's config of the model")
    heads.add_argument("--heads", type=int, metavar="N", help="attention heads")
    two.add_argument(
        "--trained-in",
        choices=("uer", "elsewhere"),
        default="uer",
        help="whose LayerNorm the weights are for; elsewhere: converted to UER, not trained there",
    )
    two.add_argument("--cased", action="store_true", help="its vocabulary tells cases apart")

    three = kinds.add_parser(
        "gpt2",
        help="a task's folder of pytorch_transformers (L2KD, LAMOL)",
        description="A task's folder of pytorch_transformers, with config.json and model-finish.",
    )
    _common(three, "FOLDER", _gpt2)
    return parser


def _common(parser: argparse.ArgumentParser, source: str, convert: object) -> None:
    parser.add_argument("path", type=Path, metavar=source)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="score this text, not a paragraph of English"
    )
    parser.set_defaults(convert=convert)


def _fairseq(options: argparse.Namespace) -> tuple[Path, Converted]:
    names = ("bpe", "tokenizer", "head", "heads")
    own = {name: getattr(options, name) for name in names}
    dtype = DTYPES[options.dtype]
    return options.path, fairseq.convert(options.path, dictionary=options.dict, dtype=dtype, **own)


def _uer(options: argparse.Namespace) -> tuple[Path, Converted]:
    names = ("config", "heads", "trained_in", "cased")
    own = {name: getattr(options, name) for name in names}
    return options.path, uer.convert(options.path, options.vocab, **own)


def _gpt2(options: argparse.Namespace) -> tuple[Path, Converted]:
    return options.path / gpt2.WEIGHTS, gpt2.convert(options.path)
