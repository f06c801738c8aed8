"""Models whose weights have a byte each on a CPU: beside transformers' own, and when they are chosen."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from model_cases import GEMMA2, IDS, LLAMA, largest_difference, logits
from q6k_kernels import load_model, open_bundle
from q6k_kernels.generate.generator import Generator
from q6k_kernels.models import cpu_form
from q6k_kernels.ops import products
from q6k_kernels.weights.byte_layers import ByteEmbedding, ByteLinear, ByteStack
from tiny_mixtures import QWEN3MOE
from tiny_models import Tiny

KINDS = {"llama": LLAMA, "gemma2": GEMMA2, "qwen3moe": QWEN3MOE}


def held(model: Any) -> int:
    return sum({each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}.values())


@pytest.mark.parametrize("name", list(KINDS))
def test_models_compute_what_transformers_do(name: str, tmp_path: Path) -> None:
    """Biases, scaled and tied embeddings, joined projections and experts; a prompt, and token by token."""
    tiny: Tiny = KINDS[name]
    bundle, theirs = tiny.bundle(tmp_path)
    ours = load_model(bundle, weights="bytes")
    kinds = {type(module) for module in ours.modules()}
    assert {ByteLinear, ByteEmbedding} <= kinds
    assert (ByteStack in kinds) == (name == "qwen3moe")
    assert not any(kind.__name__.startswith("Packed") and kind.__name__ != "PackedExperts" for kind in kinds)
    assert ours.dtype is torch.float32
    assert largest_difference(logits(ours), logits(theirs)) < 1e-4
    ids = IDS[:1, :8]
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 8:].tolist()
    for model in (ours, copy.deepcopy(ours)):
        generator = Generator(model, capacity=64)
        generator.prefill(ids[0].tolist())
        assert list(generator.generate(8)) == expected


def test_a_model_is_compiled_as_one_graph(tmp_path: Path) -> None:
    bundle, _ = LLAMA.bundle(tmp_path)
    model: Any = load_model(bundle, weights="bytes")
    layer = model.model.layers[0].mlp.down_proj
    graphs = list[Any]()

    def noted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(1, 3, layer.weight.codes.shape[1])
    with torch.no_grad():
        found = torch.compile(layer, backend=noted, fullgraph=True)(x)
        assert torch.equal(found, layer(x))
    assert len(graphs) == 1


def test_layers_that_are_tied_share_their_bytes(tmp_path: Path) -> None:
    bundle, _ = GEMMA2.bundle(tmp_path)
    model: Any = load_model(bundle, weights="bytes")
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert embedding.codes.data_ptr() == head.codes.data_ptr()
    packed = cpu_form.bytes_taken(open_bundle(bundle).manifest.tensors)
    dense = sum(t.numel() * 4 for t in model.parameters())
    assert packed <= held(model) <= packed + dense + 4096  # frequencies of rotary embeddings


def test_16_bits_are_what_the_packed_model_has_nearly(tmp_path: Path) -> None:
    bundle, _ = replace(LLAMA, config=LLAMA.config | {"num_hidden_layers": 1}).bundle(tmp_path)
    found, packed = (logits(load_model(bundle, dtype=torch.bfloat16, weights=form)) for form in ("bytes", "packed"))
    assert found.dtype is torch.bfloat16
    assert largest_difference(found.float(), packed.float()) < 0.1


def test_the_form_is_chosen_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = LLAMA.bundle(tmp_path)
    tensors = open_bundle(bundle).manifest.tensors
    taken = cpu_form.bytes_taken(tensors)
    monkeypatch.setattr(cpu_form, "free_memory", lambda: 2 * taken)
    assert cpu_form.choose("auto", tensors, "cpu", "auto")[0] == "bytes"
    assert cpu_form.choose("packed", tensors, "cpu", "auto") == ("packed", "packed")
    no = "packed, as activations of 8 bits meet packed weights"
    assert cpu_form.choose("auto", tensors, "cpu", "int8") == ("packed", no)
    assert cpu_form.choose("auto", tensors, "cuda", "auto")[0] == "packed"
    for device, activations, reason in (
        ("cuda", "auto", "a GPU's kernels"),
        ("cpu", "int8", "activations of 8 bits"),
    ):
        with pytest.raises(ValueError, match=f"expected packed, found 'bytes': {reason}"):
            cpu_form.choose("bytes", tensors, device, activations)
    with pytest.raises(ValueError, match="expected one of auto, packed, bytes, found 'dense'"):
        cpu_form.choose("dense", tensors, "cpu", "auto")  # type: ignore[arg-type]
    monkeypatch.setattr(cpu_form, "free_memory", lambda: 2 * taken - 2)
    form, reason = cpu_form.choose("auto", tensors, "cpu", "auto")
    assert (form, "a byte each would take" in reason) == ("packed", True)
    assert cpu_form.choose("bytes", tensors, "cpu", "auto")[0] == "bytes"
    monkeypatch.setattr(products, "installed", lambda: False)
    assert "not installed" in cpu_form.choose("auto", tensors, "cpu", "auto")[1]


def test_free_memory_is_that_of_the_machine_and_of_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  5 kB\n"}
    monkeypatch.setattr(cpu_form, "_text", lambda path: files.get(path, ""))
    assert cpu_form.free_memory() == 5 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert cpu_form.free_memory() == 5 * 1024
    files["/sys/fs/cgroup/memory.max"] = "4000\n"
    assert cpu_form.free_memory() == 3000
    files["/sys/fs/cgroup/memory.stat"] = "anon 100\ninactive_file 900\nactive_file 5\n"
    assert cpu_form.free_memory() == 3900
    old = "/sys/fs/cgroup/memory/memory."
    files |= {f"{old}limit_in_bytes": "70\n", f"{old}usage_in_bytes": "90\n"}
    assert cpu_form.free_memory() == 0
