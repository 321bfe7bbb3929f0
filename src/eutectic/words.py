"""How texts are put: numbers with their nouns, lists of names, foreign strings made safe."""

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence

# What others call a key of a recipe, an option or a parameter -> how it is called here. The first
# that a command or a file has counts.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("alpha", "lambda", "lam", "scaling", "coefficient", "scale_factor"), ("scale",)
    ),
    **dict.fromkeys(("algorithm", "algo", "merge_method", "strategy"), ("method",)),
    **dict.fromkeys(("out", "out_dir", "output_dir", "outdir", "dest", "to", "save"), ("output",)),
    **dict.fromkeys(("base_model", "pretrained", "pretrained_model", "base_path"), ("base",)),
    **dict.fromkeys(("models", "adapters", "checkpoints", "finetuned"), ("experts", "expert")),
    **dict.fromkeys(("model",), ("experts", "checkpoint", "base")),
    **dict.fromkeys(("workers", "jobs", "num_workers", "n_jobs", "cpus", "cores"), ("threads",)),
    **dict.fromkeys(("ram", "mem", "max_memory", "max_mem"), ("memory",)),
    **dict.fromkeys(("force", "overwrite", "fresh", "clean"), ("restart",)),
    **dict.fromkeys(("stats", "statistic", "grams"), ("statistics",)),
    **dict.fromkeys(("lora", "peft"), ("adapter",)),
    **dict.fromkeys(("torch_dtype", "precision_out", "out_dtype", "type"), ("dtype",)),
    **dict.fromkeys(("dataset", "datasets", "data_file", "proxy_data", "input"), ("data",)),
    **dict.fromkeys(("bs", "batch", "per_device_batch_size"), ("batch_size",)),
    **dict.fromkeys(("gpu", "cuda"), ("device",)),
    **dict.fromkeys(("max_seq_length", "max_len", "max_tokens", "seq_len"), ("max_length",)),
    **dict.fromkeys(("n", "num_samples", "max_samples", "samples"), ("max_examples", "limit")),
    **dict.fromkeys(("config", "tasks_file", "task", "benchmarks"), ("tasks", "task")),
    **dict.fromkeys(("trust_remote_code",), ("trust_code",)),
    **dict.fromkeys(("tokenizer", "tokenizer_source", "vocab"), ("vocabulary",)),
    **dict.fromkeys(("r", "ranks", "lora_rank"), ("rank",)),
    **dict.fromkeys(("params", "parameter", "set_param"), ("param", "parameters")),
    **dict.fromkeys(("figure", "plots", "fig"), ("plot",)),
    **dict.fromkeys(("k", "density_fraction", "topk", "top_k", "sparsity"), ("density",)),
}


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun in the singular or the plural.

    >>> counted(1, "layer"), counted(1200, "layer"), counted(2, "matrix", "matrices")
    ('1 layer', '1,200 layers', '2 matrices')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def between(low: float, high: float) -> str:
    """Return a range of numbers, one number where both ends are the same.

    >>> between(8, 8), between(4, 64)
    ('8', '4 to 64')
    """
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


_shown_below: list[str] = []


def show_below(root: str) -> None:
    """Take note that what lies in object stores is shown below a folder, as `scheme/bucket/…`."""
    if root not in _shown_below:
        _shown_below.append(root)


def with_urls(text: str) -> str:
    """Return a text with the URLs of what is shown below such a folder in place of its paths.

    What a run keeps there while it writes is on this machine alone, and keeps its path.
    """
    for root in _shown_below:
        if root in text:
            found = re.escape(root) + r"[/\\](\w+)[/\\]([^\s'\"]*)"
            text = re.sub(found, _as_url, text)
    return text


_OF_A_RUN = re.compile(r"\.(partial|stages|lock|outcomes\.jsonl)(?![\w-])")


def _as_url(match: re.Match[str]) -> str:
    return match[0] if _OF_A_RUN.search(match[2]) else f"{match[1]}://{match[2]}"


def few(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def is_plain(text: str) -> bool:
    """Tell whether a text holds no control characters, so that it does nothing but appear."""
    return text.isprintable() or not any(map(_is_control, text))


def plain(text: str, kept: str = "\n") -> str:
    r"""Return a text with its control characters written out (`\x1b`), but for those `kept`."""
    if is_plain(text):
        return text
    return "".join(c if c in kept or not _is_control(c) else repr(c)[1:-1] for c in text)


def shown(value: object, limit: int = 80) -> str:
    """Return a value from elsewhere for a message: control characters written out, cut short."""
    # A value may be large or hold itself often, and repr() would write all of it.
    few_items = value[:limit] if isinstance(value, (str, bytes, list, tuple)) else value
    if isinstance(few_items, dict):
        return f"a table of {len(few_items)} keys"
    text = repr(few_items)
    return text if len(text) <= limit else f"{text[:limit]}…"


# Control characters (C0, C1), marks of direction and other invisible ones, halves of pairs.
_CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # part of words in some scripts, and of pictures


def _is_control(character: str) -> bool:
    return character not in _JOINERS and unicodedata.category(character) in _CONTROLS


def public_path(path: object) -> str:
    """Return a path for files that are published: of an absolute one its last part.

    >>> public_path("/home/me/models/a"), public_path("models/a")
    ('a', 'models/a')
    """
    text = plain(str(path), kept="").replace("\\", "/")
    private = text.startswith(("/", "~", "..")) or text[1:2] == ":"
    return text.rstrip("/").rpartition("/")[2] or text if private else text


_MARKS = re.compile(r"([\\`*\[\]|~])")  # Markdown that reaches beyond one word


def as_markdown(text: object) -> str:
    """Return a text from elsewhere for a card: one line, without Markdown and HTML of its own."""
    return _MARKS.sub(r"\\\1", html.escape(plain(str(text), kept=""), quote=False))


def percent(share: float) -> str:
    """Return a part of one as text, never 0 % of something or 100 % of what is not all.

    >>> percent(0.996), percent(0.004), percent(0.42), percent(0.9999), percent(1)
    ('99.6 %', '0.4 %', '42 %', 'more than 99.9 %', '100 %')
    """
    value = 100 * share
    if 0 < value < 0.1:
        return "less than 0.1 %"
    if 99.9 < value < 100:
        return "more than 99.9 %"
    if 99 < value < 100:
        return f"{value:.1f} %"
    return f"{value:.1f} %" if value < 10 and round(value, 1) != round(value) else f"{value:.0f} %"


def percents(parts: Sequence[float]) -> list[str]:
    """Return parts of one whole as texts that add up: to whole percents, or to tenths.

    >>> percents([0.9962, 0.0038, 0.0]), percents([1 / 3, 1 / 3, 1 / 3]), percents([1.0, 0.0])
    (['99.6 %', '0.4 %', '0 %'], ['34 %', '33 %', '33 %'], ['100 %', '0 %'])
    """
    values = [100 * part for part in parts]
    units = 10 if any(0 < v < 10 or 90 < v < 100 for v in values) else 1
    floors = [int(v * units + 1e-9) for v in values]
    short = round(sum(values) * units) - sum(floors)
    order = sorted(range(len(values)), key=lambda i: floors[i] - values[i] * units)
    for i in order[: max(short, 0)]:
        floors[i] += 1
    texts: list[str] = []
    for part, found in zip(parts, floors, strict=True):
        if part > 0 and found == 0 and units == 10:
            texts.append("less than 0.1 %")
        elif part < 1 and found == 100 * units:
            texts.append("more than 99.9 %" if part > 0.999 else f"{100 * part:.1f} %")
        else:
            texts.append(f"{found / units:g} %")
    return texts
