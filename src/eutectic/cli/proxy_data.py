"""Options of `collect` and `route` about the data that a model is run on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eutectic.cli.records import option

if TYPE_CHECKING:
    from eutectic.models.batches import Batch
    from eutectic.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a model and its proxy data are read."""

    batch_size: int = option(16, "Examples per batch.", min=1)
    max_length: int | None = option(None, "Tokens per text (default: at most 512).", min=1)
    task: str | None = option(
        None,
        "What the model does: text-classification, feature-extraction, "
        "image-classification, language-model, sequence-to-sequence, … (default: by the "
        "checkpoint's architecture).",
    )
    device: str = option("cpu", "Where the model runs, collecting.")
    split: str | None = option(None, "Split of a `datasets` folder.")
    trust_code: bool = option(False, "Allow data from module:function.", "--trust-code")
    text_column: str = option("text", "Column of texts.")
    text_pair_column: str = option("text_pair", "Column of second texts.")
    label_column: str = option("label", "Column of labels.")
    source_column: str = option("source", "Column of source texts.")
    target_column: str = option("target", "Column of target texts.")
    image_column: str = option("image", "Column of images.")

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

    batch_size: int = option(16, "Examples per batch, collecting.", min=1)
    label_column: str = field(default="label", init=False)
