"""Programs of others on a bundle: the commands of `kernels/README.md#with-other-tools`, each on a tiny model.

`scripts/check_tools` installs what they take and runs this file; the gate goes without.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="scripts/check_tools installs accelerate and others")
pytest.importorskip("peft", reason="scripts/check_tools installs peft and others")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bundle_helpers import invoke
from q6k_kernels import PackedLinear
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models import pretrained
from q6k_kernels.models.adapters import on_packed_layers
from tiny_chat import tiny_chat

IDS = torch.arange(270, 290)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    bundle, reference = tiny_chat(tmp_path_factory.mktemp("tools"))
    assert invoke("hf", bundle).exit_code == 0
    return bundle, reference


@pytest.fixture(scope="module")
def bundle(made: tuple[Path, Any]) -> Path:
    return made[0]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def environment() -> dict[str, str]:
    """Variables of a program that knows nothing of this package, and has no network."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return os.environ | offline | {"NO_PROXY": "*", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_layers_are_spread_by_accelerate(bundle: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(bundle, device_map=device_map, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(bundle)))


def test_nothing_is_put_on_the_disk(bundle: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(bundle, device_map={"model": "cpu", "lm_head": "disk"})


def test_sizes_for_a_device_map_are_those_of_packed_weights(bundle: Path) -> None:
    """A GPU takes as many layers as fit into its memory, packed."""
    seen = []
    fill = pretrained.Loading.fill

    def noted(self: Any, model: Any, device_map: Any) -> None:
        total = sum(
            parameter.numel() * self.element_size(name, parameter) for name, parameter in model.named_parameters()
        )
        fill(self, model, device_map)
        seen.append((total, sum(each.nbytes for each in model.parameters())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained.Loading, "fill", noted)
        AutoModelForCausalLM.from_pretrained(bundle)
    expected, found = seen[0]
    assert expected == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "targets", "message"),
    [
        ({}, ["q_proj"], 'joined with its neighbours.*quantization_config."joined". = False'),
        ({"joined": False, "weights": "bytes"}, ["q_proj"], "a byte for each weight have no gradients"),
        ({"joined": False}, "all-linear", "finds torch.nn.Linear, and no packed layers"),
    ],
)
def test_what_a_lora_does_not_fit_is_named(settings: Any, targets: Any, message: str, bundle: Path) -> None:
    config = AutoConfig.from_pretrained(bundle)
    config.quantization_config |= settings
    model = AutoModelForCausalLM.from_pretrained(bundle, config=config)
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(model, on_packed_layers(LoraConfig(target_modules=targets, task_type="CAUSAL_LM")))


def test_peft_trains_a_lora_that_also_fits_the_original_model(made: tuple[Path, Any], tmp_path: Path) -> None:
    bundle, reference = made
    config = AutoConfig.from_pretrained(bundle)
    config.quantization_config["joined"] = False
    model = AutoModelForCausalLM.from_pretrained(bundle, config=config, dtype=torch.float32)
    before = {name: each.clone() for name, each in model.named_parameters()}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    trained = get_peft_model(model, on_packed_layers(lora))
    optimizer = torch.optim.AdamW([each for each in trained.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = trained(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    kept = {name.replace(".base_layer", ""): each for name, each in trained.base_model.model.named_parameters()}
    assert all(torch.equal(kept[name], each) for name, each in before.items())
    with pytest.raises(UnsupportedModelError, match="cannot be merged into packed weights"):
        trained.merge_and_unload()
    trained.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    again = AutoModelForCausalLM.from_pretrained(bundle, config=config, dtype=torch.float32)
    again = PeftModel.from_pretrained(
        again, tmp_path, config=on_packed_layers(LoraConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(logits(again), logits(trained.eval()))
    original = logits(PeftModel.from_pretrained(reference, tmp_path))
    assert (logits(again) - original).norm() < 1e-3 * original.norm()
    assert isinstance(again.base_model.model.model.layers[0].self_attn.o_proj, PackedLinear)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[str]:
    """The address of `transformers serve`."""
    pytest.importorskip("fastapi", reason="scripts/check_tools installs fastapi and others")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", program, "serve", str(bundle), "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--device", "cpu"], env=environment())
    try:
        for _ in range(600):
            assert process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_transformers_serve_answers_openais_client(bundle: Path, server: str) -> None:
    """Streamed, whole, and several at once, with the tokens that the model itself chooses."""
    openai = pytest.importorskip("openai", reason="scripts/check_tools installs openai and others")
    client = openai.OpenAI(base_url=server, api_key="none", timeout=120)
    messages = [{"role": "user", "content": "The quick fox"}]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(answer, skip_special_tokens=True)
    asked = {"model": str(bundle), "messages": messages, "max_tokens": 8, "temperature": 0.0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    found: dict[int, str] = {}

    def stream(number: int) -> None:
        parts = client.chat.completions.create(**asked, stream=True)
        found[number] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), expected)


def test_lm_eval_runs_a_task(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="scripts/check_tools installs lm-eval and others")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": "The quick brown", "choices": ["fox", "dog"], "answer": at % 2} for at in range(4)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tasks / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={bundle}"]
    command += ["--include_path", str(tasks), "--tasks", "tiny", "--device", "cpu", "--output_path", str(tmp_path)]
    subprocess.run(command, check=True, env=environment() | {"HF_HOME": str(tmp_path / "home")}, cwd=tmp_path)
    (report,) = tmp_path.rglob("results_*.json")
    # The likelier of two words is the same in every row, and the right one in half of them.
    assert json.loads(report.read_text(encoding="utf-8"))["results"]["tiny"]["acc,none"] == 0.5
