"""Files of a checkpoint name classes; nothing but models and processors is taken by name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from eutectic.errors import CheckpointError
from eutectic.models.loading import load_config, load_processor, load_stored
from eutectic.models.named_classes import check_named_classes, model_class

HOMES: dict[str, str] = transformers._class_to_module  # pyright: ignore[reportAttributeAccessIssue]


def is_taken(name: Any, folder: Path) -> bool:
    try:
        return model_class(name, folder, transformers) is not None
    except CheckpointError:
        return False


def test_nothing_of_transformers_but_models_is_an_architecture(tmp_path: Path):
    odd = [
        "__name__",
        "__spec__",
        "_class_to_module",
        "models",
        "trainer",
        "os.system",
        "",
        None,
        7,
    ]
    others = [n for n in transformers.__all__ if ".modeling_" not in HOMES.get(n, "")]
    assert len(others) > 2000
    assert not [n for n in [*others, *odd] if is_taken(n, tmp_path)]


def test_of_modeling_modules_models_are_taken_and_nothing_else(tmp_path: Path):
    near = ("models.bert.", "models.auto.modeling_auto", "models.switch_", "models.lxmert.")
    names = [n for n, home in HOMES.items() if home.startswith(near) and ".modeling_" in home]
    taken = {n for n in names if is_taken(n, tmp_path)}
    assert {"BertModel", "BertForSequenceClassification", "LxmertModel"} <= taken
    assert {"AutoModel", "AutoModelForCausalLM"} <= set(names) - taken
    assert not taken & {"LxmertVisualFeatureEncoder", "MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModel"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of modules that transformers is about to drop
def test_of_all_that_transformers_has_models_are_taken_and_nothing_else(tmp_path: Path):
    taken = {name for name in transformers.__all__ if is_taken(name, tmp_path)}
    parent: Any = transformers.PreTrainedModel
    modelling = [n for n in transformers.__all__ if ".modeling_" in HOMES.get(n, "")]
    kinds = {name: getattr(transformers, name) for name in modelling}
    models = {n for n, k in kinds.items() if isinstance(k, type) and issubclass(k, parent)}
    assert taken == models - {"PreTrainedModel"}
    assert len(taken) > 1500


def write(folder: Path, file: str, **content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "name", ["pipeline", "Trainer", "logging", "AutoConfig", "AutoProcessor", "__name__", "Nowhere"]
)
def test_a_named_architecture_is_not_called(tmp_path: Path, name: str):
    folder = write(tmp_path, "config.json", model_type="bert", architectures=[name])
    with pytest.raises(CheckpointError, match="no model class|not in transformers"):
        load_stored(folder)


@pytest.mark.parametrize("names", ["BertModel", [["BertModel"]], {"a": 1}, [7]])
def test_architectures_are_a_list_of_names(tmp_path: Path, names: Any):
    folder = write(tmp_path, "config.json", model_type="bert", architectures=names)
    with pytest.raises(CheckpointError, match="must be a list of names"):
        load_config(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("tokenizer_config.json", "tokenizer_class"),
        ("preprocessor_config.json", "image_processor_type"),
        ("preprocessor_config.json", "feature_extractor_type"),
        ("processor_config.json", "processor_class"),
    ],
)
@pytest.mark.parametrize("name", ["pipeline", "Trainer", "BertModel", "trainer"])
def test_a_named_processor_is_a_processor(tmp_path: Path, file: str, key: str, name: str):
    write(tmp_path, "config.json", model_type="bert")
    write(tmp_path, file, **{key: name})
    with pytest.raises(CheckpointError, match=f"'{name}', which is no such class"):
        load_processor(tmp_path, tmp_path, images="image" in key)


def test_processors_that_people_have_pass(tmp_path: Path):
    for file, key, names in (
        ("tokenizer_config.json", "tokenizer_class", "BertTokenizer BertTokenizerFast OfMyOwn "
         "PreTrainedTokenizerFast LlamaTokenizerFast TokenizersBackend T5Tokenizer CLIPTokenizer"),
        ("preprocessor_config.json", "image_processor_type", "ViTImageProcessor CLIPImageProcessor "
         "ViTImageProcessorFast CLIPImageProcessorPil"),
        ("preprocessor_config.json", "feature_extractor_type", "ViTFeatureExtractor "
         "WhisperFeatureExtractor"),
        ("processor_config.json", "processor_class", "CLIPProcessor LlavaProcessor"),
    ):  # fmt: skip
        for name in names.split():
            check_named_classes(write(tmp_path, file, **{key: name}), transformers)


def test_kernels_of_a_hub_are_refused(tmp_path: Path):
    text = {"attn_implementation": "somebody/kernel"}
    folder = write(tmp_path, "config.json", model_type="bert", text_config=text)
    with pytest.raises(CheckpointError, match="somebody/kernel', code of a hub"):
        load_config(folder)
    load_config(write(tmp_path, "config.json", model_type="bert", attn_implementation="sdpa"))


def test_code_of_a_checkpoint_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    (tmp_path / "own.py").write_text("raise SystemExit('ran')\n")
    own = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoTokenizer": ["own.T", None]}
    write(tmp_path, "config.json", model_type="own", auto_map=own, architectures=["M"])
    write(tmp_path, "tokenizer_config.json", auto_map=own, tokenizer_class="T")
    for load in (load_config, load_stored, lambda p: load_processor(p, p, images=False)):
        with pytest.raises((CheckpointError, ValueError, OSError)):
            load(tmp_path)
    assert "own" not in sys.modules
