"""Let llama.cpp compute the logits and the likeliest tokens of tiny models, and keep them for the tests.

    python scripts/golden/golden_logits.py FOLDER [CASE ...]

FOLDER holds llama.cpp's shared libraries, built for the CPU (libllama.so and those it needs). The structures below
are those of `include/llama.h` of October 2026; another version may have others. Weights, sums and the cache are
fp32, and flash attention is off. The cases are in `golden_cases.py`; the numbers go to `tests/models/golden`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden_cases import CASES, Case, prompt, write
from golden_dense import DENSE
from golden_gemma4 import GEMMA4
from golden_mixtures import MIXTURES

ALL = CASES | DENSE | GEMMA4 | MIXTURES
OUT = Path(__file__).parents[2] / "tests" / "models" / "golden"
BATCH = 16
"""Most tokens of a prompt at once: shorter than the prompts, so that each goes through the cache."""
DIGITS = 6
F32, NO_FLASH_ATTENTION, ERROR = 0, 0, 4
CLEAR = 10.0
"""How many tolerances apart the two likeliest tokens must be at least, so that rounding cannot swap them."""

LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class ModelParams(Structure):
    """`llama_model_params`."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", c_bool),
    ]


class ContextParams(Structure):
    """`llama_context_params`."""

    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *(
            (name, c_bool)
            for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
        ),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class Llama:
    """llama.cpp's library.

    Args:
        folder: the folder of its files.
    """

    def __init__(self, folder: Path) -> None:
        # Libraries on which others depend come first: they need not be on the loader's path.
        for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        self.library: Any = ctypes.CDLL(str(folder / "libllama.so"))
        results = {
            "llama_version": c_char_p,
            "llama_model_default_params": ModelParams,
            "llama_context_default_params": ContextParams,
            "llama_model_load_from_file": c_void_p,
            "llama_init_from_model": c_void_p,
            "llama_batch_init": Batch,
            "llama_get_logits_ith": POINTER(c_float),
        }
        for name, result in results.items():
            getattr(self.library, name).restype = result
        self._log = LOG_CALLBACK(_log)  # kept: the library calls it as long as it lives
        self.library.llama_log_set(self._log, None)
        self.library.llama_backend_init()

    @property
    def version(self) -> str:
        """The library's own word for its version."""
        return str(self.library.llama_version().decode())


class Text:
    """A text that a model of llama.cpp continues.

    Args:
        llama: the library.
        path: a GGUF file.
        vocabulary: number of tokens.
        capacity: most tokens.
    """

    def __init__(self, llama: Llama, path: Path, vocabulary: int, capacity: int) -> None:
        self._library, self._vocabulary, self._length = llama.library, vocabulary, 0
        model_params = self._library.llama_model_default_params()
        self._model = c_void_p(self._library.llama_model_load_from_file(str(path).encode(), model_params))
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = self._library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity, BATCH, BATCH
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = F32
        params.flash_attn_type = NO_FLASH_ATTENTION
        self._context = c_void_p(self._library.llama_init_from_model(self._model, params))
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context for {path}")

    def add(self, tokens: list[int]) -> NDArray[np.float32]:
        """Process the next tokens; return the logits after each, fp32 (tokens, vocabulary)."""
        found = [self._part(tokens[at : at + BATCH]) for at in range(0, len(tokens), BATCH)]
        return np.concatenate(found)

    def _part(self, tokens: list[int]) -> NDArray[np.float32]:
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, self._length + at
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
        if code := self._library.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode returns {code}")
        rows = [self._library.llama_get_logits_ith(self._context, at) for at in range(len(tokens))]
        found = np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)).copy() for row in rows])
        self._library.llama_batch_free(batch)
        self._length += len(tokens)
        return found

    def close(self) -> None:
        """Free the model."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def golden(llama: Llama, name: str, case: Case) -> dict[str, Any]:
    """Return what is kept of a case: logits by position, and the likeliest tokens after the prompt."""
    ids = prompt(name, case)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        made_of = write(name, case, path)
        text = Text(llama, path, case.vocabulary, case.prompt + case.answer)
        logits, answer = text.add(ids), list[int]()
        after = logits[-1:]
        spread = float(logits.std())
        while len(answer) < case.answer:
            second, first = np.sort(after[0])[-2:]
            if first - second < CLEAR * case.tolerance * spread:
                raise SystemExit(f"{name}: token {len(answer)} is nearly a draw: give the case another seed")
            answer.append(int(after[0].argmax()))
            after = text.add(answer[-1:])
        text.close()
    kept = {str(at): [float(f"{value:.{DIGITS}g}") for value in logits[at]] for at in case.logit_positions}
    return {"llama.cpp": llama.version, "weights": made_of, "spread": spread, "logits": kept, "tokens": answer}


def main() -> None:
    """Make the files of the cases that the command line names, or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of libllama.so")
    parser.add_argument("cases", nargs="*", metavar="CASE", choices=[[], *ALL], help="default: all")
    args = parser.parse_args()
    llama = Llama(args.folder)
    OUT.mkdir(exist_ok=True)
    for name in args.cases or ALL:
        path = OUT / f"{name}.json"
        kept = golden(llama, name, ALL[name])
        path.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
