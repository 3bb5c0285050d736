"""`minitune export`: reads, writes, reads what was written again and compares, and only then gives it its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minitune.config import UserError
from minitune.export.report import Report, measure, say

if TYPE_CHECKING:
    from minitune.export.hf import Beside
    from minitune.export.source import Source
    from minitune.export.stream import Stored
    from minitune.export.verify import Comparison

FORMATS = ("hf", "minicpm", "gguf")
K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")
QUANTS = {"hf": ("int4",), "minicpm": (), "gguf": ("f16", "q8_0", "q4_0", *K_QUANTS)}


def export(
    model: str | Path,
    adapter: str | Path | None = None,
    format: Literal["hf", "minicpm", "gguf"] = "hf",
    output: str | Path = "",
    dtype: str = "auto",
    quant: str = "",
    verify: bool = True,
    verify_data: str | Path = "",
    quiet: bool = False,
    max_shard_bytes: int = 1 << 29,
) -> Report:
    """Writes `model`, with `adapter` merged, to the new folder `output` (or, for gguf, the new file `x.gguf`).

    dtype: `auto` keeps each tensor's own. quant: `int4` (hf); f16, the default, q8_0, q4_0, q4_k_m, q5_k_m, q6_k
    (gguf). verify: read what was written again and compare with the model that was trained, over built-in prompts
    or the rows of `verify_data`. Whole or not at all; the memory in use is about one shard's (`max_shard_bytes`).
    Raises UserError for an output that holds something, an adapter for another model, a format that can't hold this
    model, a file that is not the model that was trained, or a full disk.
    """
    from minitune.checkpoint import hub
    from minitune.checkpoint.weights import read_json
    from minitune.export.hf import Beside
    from minitune.export.source import Source

    quant = check_words(format, quant, dtype)
    base = hub.resolve(str(model), quiet=quiet)
    run = Path(adapter).expanduser() if adapter else None
    target = check_output(output, base, run, format)
    config = read_json(base / "config.json")
    report = Report(target)
    beside = Beside(base, run, config, report)
    with Source(base, run) as source:
        if source.group:
            report.notes.append(f"{run}: trained over a base in 4 bits; its part is added to those weights")
        try:
            job = Job(source, beside, config, report, format, dtype, quant, max_shard_bytes)
            with placed(target) as part:
                job.read(verify, str(verify_data))
                again = job.again(job.write(part))
                if verify:
                    report.comparison = job.compare(again)
                    report.comparison.check(job.judged_as)
                job.measure(again)
        except Exception as error:
            raise _unwritten(target, error) from None
    if not quiet:
        say(report)
    return report


def check_words(format: str, quant: str, dtype: str) -> str:
    """The quantisation meant; UserError for words that are none, or don't go together."""
    from minitune.checkpoint.weights import DTYPES

    quant = quant.lower()  # Q4_K_M, as llama.cpp's own tools write it
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; it takes {', '.join(FORMATS)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    if quant and quant not in QUANTS[format]:
        fits = [f for f in FORMATS if quant in QUANTS[f]]
        takes = ", ".join(QUANTS[format]) or "none"
        mend = f"; {quant} goes with --format {fits[0]}" if fits else ""
        raise UserError(f"--format {format} takes --quant {takes}, not {quant!r}{mend}")
    if format == "gguf" and dtype != "auto":
        raise UserError(f"--format gguf takes no --dtype; give --quant {', '.join(QUANTS['gguf'])}")
    if quant in K_QUANTS:
        from minitune.export import kquant

        kquant.check()
    return quant or ("f16" if format == "gguf" else "")


def check_output(output: str | Path, base: Path, run: Path | None, format: str) -> Path:
    """Where to write; UserError where anything would be written over."""
    if not str(output):
        raise UserError("export needs --output, a new folder")
    target = Path(output).expanduser()
    for folder, flag in ((base, "--model"), (run, "--adapter")):
        if folder is not None and target.resolve() == folder.resolve():
            raise UserError(f"{target}: is the folder of {flag}; give another --output")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: holds files already; give a new folder as --output, or empty this one")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; give a new name as --output")
    if target.suffix == ".gguf":
        if format != "gguf":
            raise UserError(f"{target}: --format {format} writes a folder; give one as --output, or --format gguf")
        if (other := modelfile_of(target)).exists() or target.is_dir():
            raise UserError(f"{other if other.exists() else target}: is there already; give another --output")
    return target


def modelfile_of(target: Path) -> Path:
    """The Modelfile's place: beside a .gguf file under its name, or in the folder."""
    return target.with_suffix(".Modelfile") if target.suffix == ".gguf" else target / "Modelfile"


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`; or, for a file x.gguf, whose files move beside it at the end."""
    from minitune.checkpoint.folder import whole

    if target.suffix != ".gguf":
        with whole(target) as part:
            yield part
        return
    folder = target.with_name(f".{target.name}.files")
    try:
        with whole(folder, named=target) as part:
            yield part
        for file in sorted(folder.iterdir()):
            os.replace(file, target.parent / file.name)
    finally:
        if folder.is_dir():
            import shutil

            shutil.rmtree(folder)


class Job:
    """One export: what is read, how it is written, and how the written is read again."""

    def __init__(
        self,
        source: Source,
        beside: Beside,
        config: dict[str, Any],
        report: Report,
        format: str,
        dtype: str,
        quant: str,
        max_shard_bytes: int,
    ):
        from minitune.checkpoint.weights import DTYPES
        from minitune.export import gguf, hf, int4

        self.source, self.beside, self.config, self.report = source, beside, config, report
        self.format, self.quant, self.max_shard_bytes = format, quant, max_shard_bytes
        self.dtype = DTYPES.get(dtype)
        self.group = 0
        if quant == "int4":
            self.group, self.dtype = int4.group_size(source, report), int4.rest_dtype(source, self.dtype)
        is_gguf = format == "gguf"
        self.judged_as = gguf.LIMITS[quant] if is_gguf else hf.limits_of(source, self.dtype, bool(self.group))

    def read(self, verify: bool, rows: str) -> None:
        """Runs the trained model over the prompts: what to compare with, and what the linears are given."""
        from minitune.export import int4
        from minitune.export.stream import hidden
        from minitune.export.verify import held_out, prompts

        template, watcher = self.beside.template, int4.Watcher()
        self.moments = watcher.moments
        own, self.name = prompts(template, self.source.decoder.config.vocab_size)
        if rows and template is None:
            raise UserError(f"{rows}: can't be read as prompts: the model has no tokenizer or no chat template")
        self.documents = held_out(template, rows) if rows and template is not None else own
        self.name = f"rows of {Path(rows).name}" if rows else self.name
        if self.group:  # four bits are fitted to the built-in prompts and judged by the rows, where there are any
            h_TH = hidden(self.source, own, self.source.adapter, watcher)
            if verify:
                self.trained_TH = (
                    h_TH if self.documents is own else hidden(self.source, self.documents, self.source.adapter)
                )
        elif verify:
            self.trained_TH = hidden(self.source, self.documents, self.source.adapter)

    def write(self, part: Path) -> Path:
        """Fills `part`; returns what holds the weights: the folder, or the GGUF file."""
        from minitune.export import gguf, hf, modelfile

        report = self.report
        if self.format != "gguf":
            hf.write(
                part,
                self.source,
                self.config,
                self.beside,
                report,
                format=self.format,
                dtype=self.dtype,
                max_shard_bytes=self.max_shard_bytes,
                int4=(self.group, self.moments) if self.group else None,
            )
            return part
        target = report.output
        alone = target.suffix == ".gguf"
        name = target.name if alone else f"{target.name}-{self.quant}.gguf"
        gguf.write(part / name, self.source, self.beside, self.config, report, quant=self.quant)
        text = modelfile.modelfile(name, self.beside.template, report)
        (part / modelfile_of(target).name).write_text(text, encoding="utf-8")
        report.files = [target if alone else target / name, modelfile_of(target)]
        return part / name

    def again(self, written: Path) -> Stored:
        """What was written, read anew by our own readers."""
        from minitune.export.stream import Folder, Gguf

        return Gguf(written) if self.format == "gguf" else Folder(written)

    def compare(self, again: Stored) -> Comparison:
        """The written model against the trained one."""
        from minitune.export.verify import compare

        return compare(self.source, self.trained_TH, again, self.documents, self.name)

    def measure(self, again: Stored) -> None:
        """How another program will tokenise a conversation: by the tokenizer that a GGUF holds, or the one beside."""
        if self.beside.template is None:
            return
        other = None
        if self.format == "gguf":
            from minitune.checkpoint.gguf_tokenizer import tokenizer
            from minitune.export.stream import Gguf

            assert isinstance(again, Gguf)
            other = tokenizer(again.file.reader, again.file.path)
        measure(self.beside.template, self.report, other)


def _unwritten(target: Path, error: Exception) -> Exception:
    """A failure to write as one line; anything else as it is."""
    from safetensors import SafetensorError

    if isinstance(error, OSError | SafetensorError):
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return UserError(f"{target}: can't be written ({reason}); give another --output")
    return error
