"""The operations of a decoding step on a GPU: launches of `cuda/step.cuh`, and of the kernels for norms
(`norm_cuda`), the choice (`choose_cuda`), attention (`attend_cuda`), gated delta nets (`delta_cuda`) and mixtures
(`mixture_cuda`).

`step_reference` specifies the operations, in plain torch. Here the activations for packed weights pass between
launches in 8 bits: the kernel that computes them also quantises them.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from q6k_kernels.cuda import decode, decode_plan
from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda.device import Device, Variant, pointer
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate import attend_cuda, choose_cuda, delta_cuda, mixture_cuda, norm_cuda
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed, Mixture
from q6k_kernels.generate.step_reference import ProductInput, TokenChoice, TorchOperations, capped
from q6k_kernels.generate.text_choice import TextsChoice
from q6k_kernels.jit import loader
from q6k_kernels.jit.compiler import Defines
from q6k_kernels.models.layer import Activation
from q6k_kernels.weights.experts import PackedExperts, PackedStack
from q6k_kernels.weights.layers import PackedLinear

if TYPE_CHECKING:
    from torch import nn

STEP, GATE = "step.cuh", "q6k_gate"
GATE_THREADS = 128
GATES = {"silu": 0, "gelu_tanh": 1, "relu_squared": 2, "clamped_swiglu": 3}
"""Activation -> its number in the enum `Gate` of `cuda/gates.cuh`."""
_GATE = struct.Struct("@PPPPPiiiqi")


class Kernels:
    """The operations of a step on one GPU, in one dtype.

    Args:
        device: a GPU.
        dtype: dtype of activations, bfloat16 or float16.
        texts: the most texts whose tokens `attend` and `choose_of_texts` process at once.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, texts: int = 1) -> None:
        self._device = launching.device(torch.cuda.current_device() if device.index is None else device.index)
        self._torch_device, self._dtype = device, dtype
        self._fp16 = int(dtype is torch.float16)
        self._macros = macros_of(self._fp16, 1)
        self._partials = torch.empty(0, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)
        self._texts = texts
        self._bests = torch.empty(texts, choose_cuda.MOST_BLOCKS, dtype=torch.int64, device=device)
        self._counted = torch.zeros(texts, dtype=torch.int32, device=device)

    def supports(self, hidden: int, between: int, heads: Heads | DeltaHeads) -> str:
        """Return why the kernels do not support a model's sizes; "" if they do."""
        if hidden > norm_cuda.MOST_K or hidden % 32:
            return f"a hidden size of {hidden}: expected a multiple of 32 up to {norm_cuda.MOST_K}"
        if between % 32:
            return f"an intermediate size of {between}: expected a multiple of 32"
        if isinstance(heads, DeltaHeads):
            return delta_cuda.unsupported(heads)
        if heads.dim not in attend_cuda.HEAD_DIMS:
            return f"heads of {heads.dim} values: expected {', '.join(map(str, attend_cuda.HEAD_DIMS))}"
        return ""

    def reserve(self, heads: Heads | DeltaHeads) -> None:
        """Allocate the memory that `attend` and `delta` need; call it for each layer before a step is recorded."""
        if isinstance(heads, DeltaHeads):
            self._counters = self._counters.new_zeros(max(len(self._counters), heads.key_heads))
            return
        for texts in range(1, self._texts + 1):
            rows, blocks, together = attend_cuda.grid(heads, self._device, texts)
            floats = texts * rows * blocks * together * (heads.dim + 2)
            self._partials = self._partials.new_empty(max(len(self._partials), floats))
            self._counters = self._counters.new_zeros(max(len(self._counters), texts * rows))

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]:
        """Launch the residual sum and its norms, see `step_reference`; `users` decide the forms of the output.

        Several rows, of several texts, only without a mixture and further norms.
        """
        total = hidden if delta is None else torch.empty_like(hidden)
        rows, k = hidden.shape
        out, others = self._activations(k, users, rows), [torch.empty_like(hidden) for _ in further or ()]
        kernel, centred, given = norm_cuda.kernel_and_arguments(
            *(hidden, delta, after, norm, total, self._outputs(out), factor, scale),
            tuple(zip(further or (), others, strict=True)),
        )
        tokens = decode_plan.tokens_of(rows)
        variant = norm_cuda.variant(kernel, macros_of(self._fp16, tokens), k, centred)
        self._launch(variant, (tokens, 1, 1), norm_cuda.THREADS, given)
        return total, replace(out, further=tuple(others))

    def gate(
        self, gate: Tensor, up: Tensor | None, activation: Activation, users: list[nn.Module], texts: int = 1
    ) -> ProductInput:
        """Launch the activation function of `gate` times `up`, see `step_reference`: rows are a token's experts.

        Of several texts each has as many rows.
        """
        k, tokens = gate.numel() // texts, decode_plan.tokens_of(texts)
        out, stride = self._activations(k, users, texts), gate.stride(-2)
        given = gate.data_ptr(), pointer(up), *self._outputs(out), k, gate.shape[-1], stride
        self._launch(
            gate_variant(macros_of(self._fp16, tokens), GATES[activation]),
            (-(-k // (16 * GATE_THREADS)), tokens, 1),
            GATE_THREADS,
            _GATE.pack(*given, k // gate.shape[-1] * stride, texts),
        )
        return replace(out, halves=None if out.halves is None else out.halves.view(gate.shape))

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput:
        """Launch rotation, cache write and attention, see `step_reference`; of several texts only for 16 bits."""
        out, texts = self._activations(heads.count * heads.dim, users, len(q)), len(q)
        rows, blocks, together = attend_cuda.grid(heads, self._device, texts)
        codes = cached.scales is not None
        block = attend_cuda.block_of(heads.dim, self._device, cached.slots_read, codes)
        shared = (self._partials, self._counters)
        given = attend_cuda.arguments(q, k, v, heads, cached, position, shared, self._outputs(out), together)
        self._launch(
            attend_cuda.variant(self._macros, block, attend_cuda.has_form(heads), cached.places is not None),
            (blocks, rows, texts),
            32 * block.warps,
            given,
            shared_bytes=block.shared_bytes,
        )
        return out

    def delta(
        self,
        mixed: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        heads: DeltaHeads,
        states: tuple[Tensor, Tensor],
        users: list[nn.Module],
    ) -> ProductInput:
        """Launch a gated delta net, see `delta`."""
        out = self._activations(heads.value_heads * heads.value_dim, users)
        given = delta_cuda.arguments(mixed, z, b, a, heads, states, self._counters, self._outputs(out))
        self._launch(delta_cuda.variant(self._macros), (heads.value_heads, 1, 1), delta_cuda.THREADS, given)
        return out

    def supports_mixture(self, mixture: Mixture) -> str:
        """Return why the kernels do not support a mixture of experts; "" if they do."""
        return mixture_cuda.unsupported(mixture, GATES)

    def route(self, x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Launch the choice of a token's experts, see `mixture.route`."""
        return mixture_cuda.route(self._launch, self._macros[:1], x, mixture, self._counted)

    def mix(self, x: Tensor, mixture: Mixture, chosen: Tensor, factors: Tensor, beside: Tensor | None) -> Mixed:
        """Launch the products of experts, see `mixture.mix`; those of down also compute the gates."""
        experts = mixture.experts
        assert isinstance(experts, PackedExperts)  # noqa: S101 -- as `supports_mixture` has checked
        early = beside is not None  # then other launches lie between the routes and these
        stacks = cast("list[PackedStack]", [*experts.gate_up, experts.down])
        both = [mixture_cuda.products(stack, x, chosen, early=early)[0] for stack in stacks[:-1]]
        gate, up = both if len(both) == 2 else both[0].chunk(2, -1)
        if mixture_cuda.takes_codes(stacks[-1], self._device):
            gated = up, GATES[experts.activation]
            rows = mixture_cuda.products(stacks[-1], gate, chosen, early=True, gated=gated)
        else:
            between = self.gate(gate, up, cast("Activation", experts.activation), [experts]).halves
            assert between is not None  # noqa: S101 -- as experts want them
            rows = mixture_cuda.products(stacks[-1], between, chosen, early=True)
        return Mixed(rows, factors, beside, mixture.norms)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Compute a product, (M, N)."""
        if not self.takes_codes(module, activations.rows):
            assert activations.halves is not None  # noqa: S101 -- `_activations` provides them
            y: Tensor = module.forward(activations.halves)
            return y
        assert isinstance(module, PackedLinear)  # noqa: S101 -- as `takes_codes` has checked
        assert activations.codes is not None  # noqa: S101 -- `_activations` provides them
        y = torch.empty(activations.rows, module.out_features, dtype=self._dtype, device=self._torch_device)
        row = weight_type(module.format)
        decode.linear_of_codes(
            activations.codes,
            module.in_features,
            module.tiles,
            module.bias,
            module.out_features,
            row,
            y,
            self._device,
        )
        return y

    def choose(self, logits: Tensor, softcap: float | None, choice: TokenChoice) -> None:
        """Launch the choice of the next token, see `step_reference`; torch finds what filters cut, or penalises."""
        filters, suppressed = choice.filters, choice.suppressed
        if filters is not None and filters.penalises:
            TorchOperations().choose(logits, softcap, choice)
            return
        if filters is not None:
            suppressed = filters.cut(capped(logits, softcap), choice.temperature, suppressed)
        shared = self._bests, self._counted
        choose_cuda.choose(self._launch, self._macros[:2], shared, logits, softcap, choice, suppressed)
        if choice.likelihoods is not None:
            choice.likelihoods.note(capped(logits, softcap), choice.token, choice.position)

    def choose_of_texts(self, logits: Tensor, softcap: float | None, choice: TextsChoice) -> None:
        """Launch the choice of the next tokens of several texts; torch chooses if there are filters."""
        if choice.filters is not None or not choose_cuda.takes(logits):
            TorchOperations().choose_of_texts(logits, softcap, choice)
            return
        shared = self._bests, self._counted
        choose_cuda.choose_of_texts(self._launch, self._macros[:2], shared, logits, softcap, choice)

    def takes_codes(self, module: nn.Module, rows: int) -> bool:
        """Check whether a product of so many rows takes activations in 8 bits."""
        if not isinstance(module, PackedLinear) or module.activations == "bf16" or rows > decode_plan.MOST_TOKENS:
            return False
        row = weight_type(module.format)
        return decode_plan.fits(module.out_features, module.in_features, row, self._device, rows)

    def _activations(self, k: int, users: list[nn.Module], rows: int = 1) -> ProductInput:
        coded = [self.takes_codes(user, rows) for user in users]
        size = sum(decode_plan.code_bytes(k, decode_plan.tokens_of(rows))) if any(coded) else 0
        return ProductInput(
            halves=None if all(coded) else torch.empty(rows, k, dtype=self._dtype, device=self._torch_device),
            codes=torch.empty(size, dtype=torch.uint8, device=self._torch_device) if any(coded) else None,
            k=k,
            rows=rows,
        )

    def _outputs(self, out: ProductInput) -> tuple[int, int, int]:
        """Return the pointers to the 16-bit values, codes and scales; 0 for what is absent."""
        if out.codes is None:
            return pointer(out.halves), 0, 0
        codes, size = out.codes.data_ptr(), decode_plan.code_bytes(out.k, decode_plan.tokens_of(out.rows))[0]
        return pointer(out.halves), codes, codes + size

    def _launch(
        self,
        variant: Variant,
        grid: tuple[int, int, int],
        threads: int,
        arguments: bytes,
        shared_bytes: int = 0,
    ) -> None:
        loader.load(*variant, self._device.index).launch(
            grid,
            threads,
            arguments,
            stream=launching.stream(self._device),
            shared_bytes=shared_bytes,
            dependent=self._device.arch >= 90,
        )


@cache
def macros_of(fp16: int, tokens: int) -> Defines:
    """Return the macros of a dtype and a number of rows of activations in 8 bits."""
    return ("Q6K_FP16", fp16), ("Q6K_TOKENS", tokens), ("Q6K_FUSED", 0)


@cache
def gate_variant(macros: Defines, gate: int) -> Variant:
    """Return the kernel of a gate."""
    return STEP, GATE, (*macros, ("Q6K_GATE", gate))


def variants(device: Device) -> list[Variant]:
    """Return all kernels that a step may load on a GPU."""
    found = list[Variant]()
    for fp16 in (0, 1):
        macros = macros_of(fp16, 1)
        found += [gate_variant(macros, gate) for gate in GATES.values()]
        found += [*choose_cuda.variants(macros[:2]), delta_cuda.variant(macros)]
        found += [*mixture_cuda.variants(macros[:1]), *norm_cuda.variants(macros)]
        found += attend_cuda.variants(macros, device)
    return found
