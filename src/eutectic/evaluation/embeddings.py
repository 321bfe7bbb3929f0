"""Tasks that compare vectors of texts: their inputs, and the figures of their cosines."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from eutectic.data.columns import Columns, Row, check_columns
from eutectic.data.encoded_rows import TokenIds, token_ids
from eutectic.data.fingerprints import data_hash
from eutectic.data.row_files import read_rows
from eutectic.errors import Fault, RequestError, TaskError, suggest
from eutectic.evaluation.metrics import Array, Outcomes
from eutectic.evaluation.task_files import Task
from eutectic.models.sentence_modules import SentenceSettings, sentence_settings
from eutectic.models.task_kinds import EMBEDDING, TaskKind

DEPTH = 10  # ranks that count
_QUERIES = 256  # that are ranked at once
Documents = tuple[tuple[str, str], ...]  # (id, text)
Relevance = Mapping[int, float]  # document's number in the corpus -> grade


@dataclass(frozen=True)
class _Texts:
    """Rows of single texts, whatever the task calls them."""

    kind: TaskKind = "feature-extraction"
    columns: Columns = Columns()


@lru_cache(maxsize=8)
def _documents(path: str, names: tuple[str, str], file: tuple[int, int]) -> Documents:
    """Return (id, text) of a corpus; size and time of change tell one file from another."""
    del file
    columns = Columns(id=names[0], text=names[1])
    rows: list[Row] = list(read_rows(path))
    where = f"{path}, "
    advice = "Name the right one in the task: columns: {{{}: NAME}}.".format
    check_columns(rows, columns, ["id", "text"], where=where, advice=advice)
    if not rows:
        raise RequestError(f"{path}: a corpus without documents.")
    return tuple((str(row[columns.id]), str(row[columns.text])) for row in rows)


def corpus_of(task: Task) -> Documents:
    """Return (id, text) of every document of a retrieval task, in the order of the file.

    TaskError where two documents have one id.
    """
    path = Path(str(task.corpus))
    stated = path.stat()
    names = (task.columns.id, task.columns.text)
    found = _documents(str(path), names, (stated.st_size, stated.st_mtime_ns))
    seen: dict[str, int] = {}
    faults: list[Fault] = []
    for number, (name, _) in enumerate(found, 1):
        if seen.setdefault(name, number) != number:
            what = f"has the id {name!r} of row {seen[name]}."
            faults.append(Fault("document", what, f"{path.name}, row {number}"))
    if faults:
        raise TaskError(faults[:10], f"task '{task.name}'")
    return found


def rows_hash(task: Task, rows: Sequence[Row]) -> str:
    """Return the identity of rows with their answers, and of the documents that they look for."""
    own = data_hash(task, rows)
    if task.kind != "retrieval":
        return own
    digest = hashlib.sha256(own.encode())
    for document in corpus_of(task):
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()


def settings_for(task: Task, folder: Path, base: Path | None) -> SentenceSettings:
    """Return what a checkpoint, or else the base, says of texts whose vectors are compared."""
    if task.kind not in EMBEDDING:
        return SentenceSettings()
    return sentence_settings([folder, *([] if base is None else [base])])


def embedded_texts(task: Task, rows: Sequence[Row], settings: SentenceSettings) -> list[str]:
    """Return the texts to embed: of pairs all first ones, then all second; queries, then documents.

    Each behind the checkpoint's prompt for what it is.
    """
    columns = task.columns
    first = [str(row[columns.text]) for row in rows]
    if task.kind == "retrieval":
        second = [settings.document_prompt + text for _, text in corpus_of(task)]
        return [settings.query_prompt + text for text in first] + second
    second = [str(row[columns.text_pair]) for row in rows]
    return [settings.prompt + text for text in (*first, *second)]


def encoded_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> TokenIds:
    """Return the token ids of texts, each by itself."""
    return token_ids(_Texts(), [{"text": text} for text in texts], tokenizer, max_length)


def relevance_of(task: Task, rows: Sequence[Row]) -> tuple[Relevance, ...]:
    """Return the relevant documents of every query by their numbers; none where no row has any.

    A row names one id, a list of ids (each of grade 1), or a mapping of ids to grades.
    """
    column = task.columns.relevant
    if all(row.get(column) is None for row in rows):
        return ()
    places = {name: place for place, (name, _) in enumerate(corpus_of(task))}
    found: list[Relevance] = []
    faults: list[Fault] = []
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        grades: dict[int, float] = {}
        for name, grade in _stated(row.get(column)).items():
            if name not in places:
                near = suggest(name, list(places)[:1000])
                faults.append(Fault("document", f"the corpus has no {name!r}.", where, next=near))
                continue
            try:
                grades[places[name]] = value = float(grade)
            except (TypeError, ValueError):
                value = math.nan
            if not (math.isfinite(value) and value >= 0):
                what = f"the grade {grade!r} of {name!r} is no number of 0 or more."
                faults.append(Fault("document", what, where))
        if not any(grades.values()) and not any(fault.where == where for fault in faults):
            what = f"no document is relevant ({column}), so that nothing can be found."
            faults.append(Fault("document", what, where))
        found.append({place: grade for place, grade in grades.items() if grade})
    if faults:
        raise TaskError(faults[:10], f"task '{task.name}'")
    return tuple(found)


def _stated(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):  # a column of records has all ids in every row
        return {str(name): grade for name, grade in value.items() if grade is not None}
    if isinstance(value, list | tuple | set | np.ndarray):
        return {str(name): 1.0 for name in value}
    return {} if value is None else {str(value): 1.0}


def vector_outcomes(task: Task, vectors: Tensor, references: Sequence[Any]) -> Outcomes:
    """Return the outcomes of vectors in the order of `embedded_texts`, one for every row.

    Similarity: the cosines of pairs, and their scores. Retrieval: the figure of every query, see
    `ranking_figure`; of equal cosines the mean over their orders, see `tied_figure`.
    Cost of retrieval: queries × documents × width, in blocks of queries.
    """
    assert task.kind in EMBEDDING
    count = len(references)
    units = nn.functional.normalize(vectors.double(), dim=-1)
    if task.kind == "sentence-similarity":
        cosines = (units[:count] * units[count:]).sum(1)
        return Outcomes(cosines.numpy(), np.array(references, dtype=np.float64))
    documents = units[count:]
    values: list[float] = []
    for start in range(0, count, _QUERIES):
        cosines = units[start : min(start + _QUERIES, count)] @ documents.T
        # In the dtype of the vectors: the last bit of a product depends on where its row stands.
        cosines = cosines.float()
        best = cosines.topk(min(DEPTH, cosines.shape[1]), dim=1)
        reached = (cosines >= best.values[:, -1:]).sum(1).tolist()
        for row, places in enumerate(best.indices.tolist()):
            relevant, own = references[start + row], best.values[row].tolist()
            if reached[row] == len(own) == len(set(own)):
                values.append(ranking_figure(task.metric_name, places, relevant))
                continue
            sizes = Counter(own)
            sizes[own[-1]] += reached[row] - len(own)
            among = {place: float(cosines[row, place]) for place in relevant}
            ties = [(n, [relevant[p] for p in among if among[p] == v]) for v, n in sizes.items()]
            values.append(tied_figure(task.metric_name, ties, relevant))
    return Outcomes(np.array(values), np.ones(count))


def ranking_figure(metric: str, order: Sequence[int], relevant: Relevance) -> float:
    """Return a figure of one query: the first documents of its ranking against those relevant.

    `ndcg_at_10`: Σ_{i ≤ 10} grade_i / log₂(i + 1) over that of the best ranking (Järvelin &
    Kekäläinen 2002, gains as trec_eval and scikit-learn have them); `recall_at_10`: share of the
    relevant documents that are among the first ten; `mrr_at_10`: 1 / rank of the first relevant
    one, 0 if it is not among the ten.
    """
    first = list(order[:DEPTH])
    if metric == "recall_at_10":
        return sum(place in relevant for place in first) / len(relevant)
    if metric == "mrr_at_10":
        return next((1 / rank for rank, p in enumerate(first, 1) if p in relevant), 0.0)
    best = sorted(relevant.values(), reverse=True)[:DEPTH]
    found = _discounted([relevant.get(place, 0.0) for place in first])
    return found / _discounted(best)


def tied_figure(
    metric: str, ties: Sequence[tuple[int, Sequence[float]]], relevant: Relevance
) -> float:
    """Return the mean of a figure over all orders of documents of the same cosine.

    `ties` are how many documents have each of the largest cosines, and the grades of those that
    are relevant. Their order in the corpus tells nothing: a model whose vectors are all alike
    would else find what stands first there. scikit-learn's nDCG is the same mean.
    """
    before, found, none_yet = 0, 0.0, 1.0
    for size, grades in ties:
        ranks = range(before + 1, min(before + size, DEPTH) + 1)
        before += size
        if metric == "recall_at_10":
            found += len(grades) * len(ranks) / size
        elif metric == "ndcg_at_10":
            found += (
                sum(grades) / size * _discounted([0.0] * (ranks.start - 1) + [1.0] * len(ranks))
            )
        else:  # one over the first relevant one's rank, times how likely it is the first
            for passed, rank in enumerate(ranks):
                hit = min(len(grades) / (size - passed), 1.0)
                found += none_yet * hit / rank
                none_yet *= 1 - hit
    if metric == "recall_at_10":
        return found / len(relevant)
    best = sorted(relevant.values(), reverse=True)[:DEPTH]
    return found / _discounted(best) if metric == "ndcg_at_10" else found


def _discounted(grades: Sequence[float]) -> float:
    gains: Array = np.array(grades, dtype=np.float64)
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())
