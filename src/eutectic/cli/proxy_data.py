"""Options of `collect` and `route` about the data that a model is run on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eutectic.models.batch import Batch
    from eutectic.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a model and its proxy data are read."""

    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 16
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per text (default: at most 512).")
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="What the model does: text-classification, feature-extraction, "
            "image-classification, language-model, sequence-to-sequence, … (default: by the "
            "checkpoint's architecture)."
        ),
    ] = None
    device: Annotated[str, typer.Option(help="Where the model runs, collecting.")] = "cpu"
    split: Annotated[str | None, typer.Option(help="Split of a `datasets` folder.")] = None
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Allow data from module:function.")
    ] = False
    text_column: Annotated[str, typer.Option(help="Column of texts.")] = "text"
    text_pair_column: Annotated[str, typer.Option(help="Column of second texts.")] = "text_pair"
    label_column: Annotated[str, typer.Option(help="Column of labels.")] = "label"
    source_column: Annotated[str, typer.Option(help="Column of source texts.")] = "source"
    target_column: Annotated[str, typer.Option(help="Column of target texts.")] = "target"
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "image"

    def batches(
        self,
        source: str,
        loaded: LoadedModel,
        *,
        needs_labels: bool = False,
        classes: int | None = None,
        **further: Any,
    ) -> Iterable[Batch]:
        """Return the batches of a data set for a loaded model; see `open_batches`."""
        from eutectic.data.columns import Columns
        from eutectic.data.encoded_rows import BatchOptions, open_batches

        named = {
            name.removesuffix("_column"): value
            for name, value in vars(self).items()
            if name.endswith("_column")
        }
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "split": self.split,
            "trust_code": self.trust_code,
            **further,
        }
        how = BatchOptions(columns=Columns(**named), **options)
        return open_batches(source, loaded, how, needs_labels=needs_labels, classes=classes)


@dataclass(frozen=True, kw_only=True)
class RouterDataOptions(DataOptions):
    """The same for the data of a router, which takes no labels."""

    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch, collecting.")] = 16
    label_column: str = field(default="label", init=False)
