"""Bundles that transformers' own `from_pretrained` opens: the same model as `load_model`'s, or an error."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    QuantoConfig,
)

import model_cases
from model_cases import IDS, largest_difference, logits
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels import PackedEmbedding, PackedLinear, load_model, open_bundle, plugin
from q6k_kernels.bundle.manifest import FORMAT, BundleError
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.errors import UnsupportedModelError, WeightsError
from q6k_kernels.models.hub_files import CONFIG, config
from q6k_kernels.models.quantizer import PlanarConfig
from q6k_kernels.models.skeleton import shapes_of
from q6k_kernels.ops import products
from tiny_gemma4 import GEMMA4
from tiny_models import Tiny
from tiny_qwen35 import QWEN35

MODELS: dict[str, Any] = {
    **{name: model_cases.MODELS[name] for name in ("llama 3.1", "gemma2", "qwen2")},
    "qwen3.5": QWEN35,
    "gemma4": GEMMA4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each model's bundle with `config.json`, and transformers' model of its weights."""
    found = {}
    for at, (name, tiny) in enumerate(MODELS.items()):
        found[name] = tiny.bundle(tmp_path_factory.mktemp(f"model{at}"))
        write_config(found[name][0])
    return found


def write_config(bundle: Path) -> None:
    content = config(read_metadata(bundle), shapes_of(open_bundle(bundle)))
    (bundle / CONFIG).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def llama(made: dict[str, tuple[Path, Any]]) -> Path:
    return made["llama 3.1"][0]


@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_opens_as_the_model_that_it_holds(name: str, made: dict[str, tuple[Path, Any]]) -> None:
    bundle, reference = made[name]
    model, info = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(model), logits(load_model(bundle, activations="auto")))
    assert largest_difference(logits(model), logits(reference)) < 0.05
    stored = {t.name for t in open_bundle(bundle).manifest.tensors if t.storage == "planar"}
    packed = [each for each in model.modules() if isinstance(each, PackedLinear | PackedEmbedding)]
    assert stored
    assert packed
    assert not model.training
    assert not [name for name, each in model.named_parameters() if each.requires_grad or each.is_meta]
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert model.num_parameters() == reference.num_parameters()


def test_the_dtype_is_that_of_the_configuration_unless_one_is_given(llama: Path, tmp_path: Path) -> None:
    for unsaid in ({}, {"dtype": None}, {"dtype": "auto"}):
        assert AutoModelForCausalLM.from_pretrained(llama, **unsaid).dtype is torch.bfloat16
    shutil.copytree(llama, tmp_path / "other")
    for stated, dtype in (('"dtype": "float16", ', torch.float16), ("", torch.bfloat16)):
        text = (llama / CONFIG).read_text().replace('"dtype": "bfloat16", ', stated)
        (tmp_path / "other" / CONFIG).write_text(text)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=None).dtype is dtype
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16)
    assert logits(model).dtype is torch.float16
    with pytest.raises(ValueError, match="float64"):
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)


def test_a_tied_head_stays_tied(made: dict[str, tuple[Path, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made["gemma2"][0])
    before = logits(model)
    model.tie_weights()
    assert model.lm_head.tiles is model.model.embed_tokens.tiles
    assert torch.equal(logits(model), before)


def test_activations_are_chosen_in_the_configuration(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    config.quantization_config["activations"] = "bf16"
    model = AutoModelForCausalLM.from_pretrained(llama, config=config)
    assert {each.activations for each in model.modules() if isinstance(each, PackedLinear)} == {"bf16"}
    config.quantization_config["activations"] = "int4"
    with pytest.raises(ValueError, match="int4"):
        AutoModelForCausalLM.from_pretrained(llama, config=config)


@pytest.mark.parametrize(("field", "value"), [("joined", "no"), ("bits", 4)])
def test_settings_that_mean_nothing_are_refused(llama: Path, field: str, value: object) -> None:
    config = AutoConfig.from_pretrained(llama)
    config.quantization_config[field] = value
    with pytest.raises(UnsupportedModelError, match=field) as caught:
        AutoModelForCausalLM.from_pretrained(llama, config=config)
    assert "q6k-convert hf" in caught.value.remedy


@pytest.mark.skipif(not products.installed(), reason="the compiled products are not installed")
def test_weights_of_a_byte_each_are_chosen_in_the_configuration(
    made: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    bundle, _ = made["gemma2"]
    config = AutoConfig.from_pretrained(bundle)
    config.quantization_config["weights"] = "bytes"
    model = AutoModelForCausalLM.from_pretrained(bundle, config=config, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_model(bundle, weights="bytes")))
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(load_model(bundle)))


def test_another_configuration_than_the_bundles_is_an_error(llama: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rms_norm_eps: the bundle's llama has 9.99\d+e-07, found 0.5"):
        AutoModelForCausalLM.from_pretrained(llama, rms_norm_eps=0.5)


def test_none_for_a_quantisation_is_that_of_the_bundle(llama: Path, tmp_path: Path) -> None:
    """As many programs pass it; transformers would go on with random weights."""
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=None, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_model(llama, activations="auto")))
    shutil.copytree(llama, tmp_path / "altered")
    content = json.loads((llama / CONFIG).read_text())
    for altered in ({}, {"quantization_config": {"quant_method": "q6k"}}):
        (tmp_path / "altered" / CONFIG).write_text(json.dumps({**content, "quantization_config": None, **altered}))
        with pytest.raises(UnsupportedModelError, match="expected one with quant_method 'q6k-planar'"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "altered")


def test_settings_that_the_caller_gives_hold(llama: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """In place of those of `config.json`, all of them, and without transformers' warning that it ignores them."""
    path = Path(shutil.copytree(llama, tmp_path / "out"))
    content = json.loads((path / CONFIG).read_text())
    content["quantization_config"] |= {"activations": "int8"}
    (path / CONFIG).write_text(json.dumps(content))
    for asked, activations in ((PlanarConfig(activations="bf16", joined=False), "bf16"), (PlanarConfig(), "auto")):
        model: Any = AutoModelForCausalLM.from_pretrained(path, quantization_config=asked)
        assert {each.activations for each in model.modules() if isinstance(each, PackedLinear)} == {activations}
        assert hasattr(model.model.layers[0].self_attn, "qkv_proj") == asked.joined
        assert model.config.quantization_config.to_dict() == asked.to_dict()
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, quantization_config=PlanarConfig("bf16"))
    assert {each.activations for each in model.modules() if isinstance(each, PackedLinear)} == {"bf16"}
    assert not [each for each in recwarn if "quantization_config" in str(each.message)]
    with pytest.raises(
        UnsupportedModelError, match=r"fields bits that are unknown. Correct what from_pretrained or"
    ):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=PlanarConfig(bits=4))
    with pytest.raises(ValueError, match="quantized with PlanarConfig but you are passing a QuantoConfig"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=QuantoConfig("int8"))


def test_settings_may_be_fields(llama: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The format's name may be left out; a name or a field of another format is an error."""
    path = Path(shutil.copytree(llama, tmp_path / "out"))
    content = json.loads((path / CONFIG).read_text())
    content["quantization_config"] |= {"activations": "int8"}
    (path / CONFIG).write_text(json.dumps(content))
    method = {"quant_method": "q6k-planar"}
    for asked, activations in (
        (method, "auto"),
        ({"activations": "bf16"} | method, "bf16"),
        ({"joined": False}, "auto"),
    ):
        for more in ({}, {"config": AutoConfig.from_pretrained(path)}):
            model: Any = AutoModelForCausalLM.from_pretrained(path, quantization_config=dict(asked), **more)
            assert {each.activations for each in model.modules() if isinstance(each, PackedLinear)} == {activations}
            assert model.config.quantization_config.to_dict() == PlanarConfig(**asked).to_dict()
    assert not [each for each in recwarn if "quantization_config" in str(each.message)]
    for wrong in ({"load_in_4bit": True}, {"load_in_4bit": True} | method):
        with pytest.raises(UnsupportedModelError, match="fields load_in_4bit that are unknown"):
            AutoModelForCausalLM.from_pretrained(path, quantization_config=wrong)
    with pytest.raises(ValueError, match="quantized with PlanarConfig but you are passing a dict"):
        AutoModelForCausalLM.from_pretrained(
            path, quantization_config={"quant_method": "quanto", "weights": "int8"}
        )


def test_what_is_missing_is_an_error_and_never_random(llama: Path, tmp_path: Path) -> None:
    convert(llama.parent / "model.gguf", tmp_path / "less", Options(exclude=("blk.1.ffn_up*",)))
    shutil.copy(llama / CONFIG, tmp_path / "less")
    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_up\.weight \(Q6_K\) is left out of the bundle"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "less")
    (tmp_path / "less" / "bundle.json").unlink()
    with pytest.raises(BundleError, match="is not a bundle"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "less")


def test_no_other_model_is_packed_while_it_is_loaded(tmp_path: Path) -> None:
    Tiny("llama", "llama").make().save_pretrained(tmp_path)
    asked: Any
    for asked in (PlanarConfig(), {"quant_method": "q6k-planar"}):
        with pytest.raises(UnsupportedModelError, match="no model in another format can be loaded into it"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked)


def test_what_the_bundle_is_not_is_an_error(llama: Path) -> None:
    for kind, name in ((AutoModel, "LlamaModel"), (AutoModelForSequenceClassification, "LlamaForSequence")):
        with pytest.raises(UnsupportedModelError, match=f"holds a LlamaForCausalLM, and a {name}"):
            kind.from_pretrained(llama)
    with pytest.raises(UnsupportedModelError, match="of packed weights does not become"):
        AutoModelForCausalLM.from_pretrained(llama).dequantize()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_return_sequences": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_the_model_generates_as_transformers_model_of_the_same_weights(
    made: dict[str, tuple[Path, Any]], options: dict[str, Any]
) -> None:
    bundle, reference = made["gemma2"]
    config = AutoConfig.from_pretrained(bundle)
    config.quantization_config["activations"] = "bf16"  # rounded to 8 bits, some tokens are others
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32, config=config)
    model.generation_config.eos_token_id = reference.generation_config.eos_token_id
    answers = []
    for each in (model, reference):
        torch.manual_seed(0)
        answers.append(each.generate(IDS[:1], max_new_tokens=6, **options))
    assert torch.equal(*answers)


def test_a_model_of_a_bundle_assists_another(llama: Path) -> None:
    model, assistant = (AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32) for _ in range(2))
    alone = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    helped = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(alone, helped)


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    """The quantiser is registered once transformers' registry is there."""
    program = """
import sys
import q6k_kernels
assert not {"torch", "transformers"} & set(sys.modules)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "q6k-planar" in AUTO_QUANTIZER_MAPPING and "q6k-planar" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert "q6k_kernels.weights" not in sys.modules
assert not [each for each in sys.meta_path if "q6k" in type(each).__module__]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_registry_that_is_there_already_gets_the_quantiser_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, FORMAT)
    monkeypatch.delitem(sys.modules, "q6k_kernels.models.quantizer")
    plugin.watch()
    assert FORMAT in auto.AUTO_QUANTIZER_MAPPING


def test_a_transformers_without_quantisers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "q6k_kernels.models.quantizer")
    monkeypatch.delattr("transformers.quantizers.auto.register_quantizer")
    with pytest.warns(UserWarning, match="cannot open q6k-planar bundles: cannot import name 'register_quantizer'"):
        plugin.watch()


def test_a_packed_embedding_does_not_change_its_size(made: dict[str, tuple[Path, Any]]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(made["gemma2"][0])
    embedding = model.get_input_embeddings()
    size = embedding.num_embeddings
    for nothing in ((), (size,), (None, 8), (size - 1, 8)):
        assert model.resize_token_embeddings(*nothing) is embedding
    for loaded in (model, copy.deepcopy(model), load_model(made["gemma2"][0])):
        with pytest.raises(UnsupportedModelError, match=f"{size} tokens, not {size + 8}. Use ids"):
            loaded.resize_token_embeddings(size + 1, pad_to_multiple_of=8)
        assert loaded.get_input_embeddings().num_embeddings == size


def test_what_is_saved_opens_as_the_same_model(llama: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    model.generation_config.max_new_tokens = 3
    models = {"one": model, "two": copy.deepcopy(model), "three": load_model(llama)}
    for name, each in models.items():
        each.save_pretrained(tmp_path / name)
    for name in models:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert torch.equal(logits(again), logits(model))
        assert again.generation_config.max_new_tokens == (None if name == "three" else 3)
        assert open_bundle(tmp_path / name).manifest.tensors == open_bundle(llama).manifest.tensors
    with pytest.raises(FileExistsError, match="replaces no file of a bundle"):
        model.save_pretrained(tmp_path / "one")


def test_what_is_saved_keeps_its_settings(llama: Path, tmp_path: Path) -> None:
    """Also where projections were not joined, whose weights have other names than `load_model` gives them."""
    settings: dict[str, Any] = {"activations": "bf16", "weights": "packed", "joined": False}
    path = Path(shutil.copytree(llama, tmp_path / "out"))
    content = json.loads((path / CONFIG).read_text())
    content["quantization_config"] |= settings
    (path / CONFIG).write_text(json.dumps(content))
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / CONFIG).read_text())["quantization_config"]
    assert written == settings | {"quant_method": FORMAT}
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again), logits(model))


def test_an_empty_name_is_not_the_current_directory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="the name of the directory is empty"):
        load_model(llama).save_pretrained("")
    assert not [*tmp_path.iterdir()]


def test_changed_weights_are_not_saved(llama: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    model.model.norm.weight.data[3] += 1
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight is not as in"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedModelError, match="knows no push_to_hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


def test_from_the_hubs_cache_the_files_are_fetched_that_transformers_does_not_know(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "models--org--some--model" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, "model.safetensors"):
        shutil.copy(llama / name, snapshot)
    asked = []

    def snapshot_download(name: str, *, revision: str, cache_dir: Path, allow_patterns: list[str]) -> str:
        asked.append((name, revision, cache_dir))
        for each in allow_patterns[:2]:
            shutil.copy(llama / each, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(snapshot)
    assert asked == [("org/some--model", "ab" * 20, tmp_path)]
