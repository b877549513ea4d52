"""What both architectures share: patch embedding, MLP, block and VisionTransformer.

A pre-norm ViT (arXiv 2010.11929) in the shape that timm trains: class token, learned positions, biases everywhere,
LayerNorm eps 1e-6, exact GELU. Dropout on the embedding, the attention's projection and the MLP, none on attention maps.
The architectures differ in the attention class they put in, and in nothing else, unless that class takes more parameters
than the classic one and asks for a narrower MLP in return.

Every attention can be computed in two ways: forward() in fused kernels, which never hold a map, and apply_maps(maps(x), x),
slow and with the exact maps in hand.

Shapes in names: B batch, N tokens (class token included), D d_model, H heads, M maps a layer, E head dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from typing import Protocol as Interface

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffvit.kernels.dropout import Dropout, has_kernels
from diffvit.protocol import MODELS, Protocol, resolve_model, stable_seed
from diffvit.user_models import known_source, sentences


class AttentionClass(Interface):
    """What an architecture's attention must offer: see vit_classic.Attention for the plain one.

    A class may also have mlp_hidden(d_model, heads, mlp_ratio), the hidden width of its blocks' MLP: see vit_differential_v2.
    """

    def __call__(self, d_model: int, heads: int, layer: int, dropout: float) -> nn.Module: ...

    def map_flops(self, d_model: int, tokens: int, queries: int | None = None) -> int: ...


class AttentionLayer(Interface):
    """What the modules that an attention class makes must offer, beside forward, to be looked into."""

    def logits(self, x_BND: Tensor) -> Tensor: ...

    def maps(self, x_BND: Tensor) -> Tensor: ...

    def apply_maps(self, maps_BMNN: Tensor, x_BND: Tensor) -> Tensor: ...

    def lambdas(self, x_BND: Tensor) -> Tensor | None: ...

    def heads_output(self, x_BND: Tensor, queries: int | None = None) -> Tensor: ...

    def form_on(self, device: str, dtype: torch.dtype, tokens: int) -> str: ...

    def forms(self, device: torch.device, dtype: torch.dtype) -> list[str]: ...


class MLP(nn.Module):
    """Two linear layers with GELU between them. [B, N, D] -> [B, N, D]"""

    def __init__(self, d_model: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(d_model, hidden)
        self.hidden_dropout = Dropout(dropout)
        self.fc2 = nn.Linear(hidden, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.hidden_dropout(F.gelu(self.fc1(x_BND)))))


class Block(nn.Module):
    """Pre-norm transformer block. [B, N, D] -> [B, N, D], or of the first `tokens` only [B, tokens, D]"""

    def __init__(self, attention: nn.Module, d_model: int, mlp_hidden: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(d_model, eps=1e-6)
        self.mlp = MLP(d_model, mlp_hidden, dropout)

    def forward(self, x_BND: Tensor, tokens: int | None = None) -> Tensor:
        return self.after_norm(x_BND, self.norm1(x_BND), tokens)

    def after_norm(self, x_BND: Tensor, normed_BND: Tensor, tokens: int | None = None) -> Tensor:
        """What forward gives, where norm1 has been computed."""
        x_BND = x_BND[:, :tokens] + self.attn(normed_BND, tokens)
        return x_BND + self.mlp(self.norm2(x_BND))


class VisionTransformer(nn.Module):
    """Images [B, channels, image_size, image_size], normalised -> logits [B, classes].

    Args:
        attention: the class that makes each layer's attention, called with (d_model, heads, layer, dropout); layer counts from 0.
        image_size, patch_size: in pixels; patches do not overlap.
        heads: heads of a *classic* layer; differential attention pairs them.
        residual_scale: initialise() scales the projections into the residual stream.
        plain: attention is computed as it is written: in no other form, and not in fused kernels.

    Raises:
        ValueError: a patch size that does not divide the image, or heads that do not divide d_model.
    """

    def __init__(
        self,
        attention: AttentionClass,
        *,
        image_size: int,
        patch_size: int,
        channels: int,
        classes: int,
        d_model: int,
        heads: int,
        depth: int,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        residual_scale: bool = True,
        plain: bool = False,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide image size {image_size}")
        if d_model % heads:
            raise ValueError(f"{heads} heads do not divide d_model {d_model}")
        self.attention_class, self.plain = attention, plain
        self.heads = heads
        self.residual_factor = (2 * depth) ** -0.5 if residual_scale else 1.0  # two branches a block add to the stream
        self.facts: dict[str, Any] = {}  # what a checkpoint's header says of it
        self.recompute = False  # activation checkpointing: keep only the blocks' inputs for the backward pass
        self.fused = False  # compute the blocks in fused.py's kernels
        self.tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embed = nn.Conv2d(channels, d_model, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens, d_model))
        self.dropout = Dropout(dropout)
        hidden = attention.mlp_hidden(d_model, heads, mlp_ratio) if hasattr(attention, "mlp_hidden") else mlp_ratio * d_model
        self.blocks = nn.ModuleList(Block(attention(d_model, heads, layer, dropout), d_model, hidden, dropout) for layer in range(depth))
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.head = nn.Linear(d_model, classes)
        for site, module in enumerate(module for module in self.modules() if isinstance(module, Dropout)):
            module.site = site

    def forward(self, images: Tensor) -> Tensor:
        x_BND = self.embed(images)
        drawn = not has_kernels(x_BND.device, x_BND.shape[-1])  # else masks need no generator
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=drawn)
        run = again if self.recompute and torch.is_grad_enabled() else _call
        if self.fused:
            from diffvit.kernels.fused import blocks_but_last

            stream_BND, normed_BND = blocks_but_last(list(self.blocks), x_BND, run)
            x_BnD = run(cast(Block, self.blocks[-1]).after_norm, stream_BND, normed_BND, 1)
        else:
            for block in self.blocks[:-1]:
                x_BND = run(block, x_BND)
            x_BnD = run(self.blocks[-1], x_BND, 1)  # the class token is all that is used of the last block
        return self.classify(x_BnD)

    def embed(self, images: Tensor) -> Tensor:
        """What the first block gets: class token and patches, with their positions. [B, N, D]"""
        # The convolution's patches do not overlap, so it is a product: cuDNN takes several times as long.
        side, conv = self.patch_embed.kernel_size[0], self.patch_embed
        patches_BNP = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x_BND = F.linear(patches_BNP, conv.weight.flatten(1), conv.bias)
        x_BND = torch.cat([self.cls_token.expand(len(images), -1, -1), x_BND], dim=1)
        return self.dropout(x_BND + self.pos_embed)

    def classify(self, x_BND: Tensor) -> Tensor:
        """The logits that the last block's output gives. [B, classes]"""
        return self.head(self.norm(x_BND[:, 0]))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all parameters from `seed`, each from a generator of its own name, on the CPU.

        Two architectures so start with equal values wherever they have the same parameter. A module with parameters of a
        kind of its own (lambda vectors) says how they start in `initialise_parameter(name, parameter, generator)`. Matrices start as
        Xavier's; those whose products are added to the residual stream are scaled by 1 / sqrt(2 depth), as in GPT-2 (arXiv 2206.03126
        and 2505.01618 give reasons).
        """
        for path, module in self.named_modules():
            rule = getattr(module, "initialise_parameter", _initialise_parameter)
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                generator = torch.Generator().manual_seed(stable_seed("parameter", seed, name))
                value = torch.empty(parameter.shape, dtype=torch.float32)
                rule(name, value, generator)
                if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                    value *= self.residual_factor
                parameter.copy_(value)

    def parameter_groups(self) -> dict[str, int]:
        """Number of parameters by part of the model; the parts sum up to all of them."""
        groups = {
            "embedding": [*self.patch_embed.parameters(), self.cls_token, self.pos_embed],
            "attention": [p for block in self.blocks for p in cast(Block, block).attn.parameters()],
            "mlp": [p for block in self.blocks for p in cast(Block, block).mlp.parameters()],
            "norms": [p for m in self.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()],
            "head": list(self.head.parameters()),
        }
        counts = {group: sum(p.numel() for p in parameters) for group, parameters in groups.items()}
        assert sum(counts.values()) == sum(p.numel() for p in self.parameters())
        return counts

    def count_parameters(self) -> int:
        """All parameters, lambda vectors and norms included."""
        return sum(self.parameter_groups().values())

    def attention_form(self, dtype: torch.dtype) -> str:
        """How the blocks compute attention on the device that the model is on, for the record."""
        if self.plain:
            return "plain"
        layer = cast(AttentionLayer, cast(Block, self.blocks[0]).attn)
        return layer.form_on(self.pos_embed.device.type, dtype, self.tokens)

    def estimate_flops(self) -> int:
        """FLOPs of one image's forward pass: two for each multiply-add of a matrix product, nothing else counted."""
        d_model = self.pos_embed.shape[-1]
        linear = [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        flops = 2 * (self.tokens - 1) * self.patch_embed.weight.numel()
        flops += 2 * self.tokens * sum(m.weight.numel() for m in linear)
        flops += len(self.blocks) * self.attention_class.map_flops(d_model, self.tokens)
        return flops + 2 * self.head.weight.numel() - self._flops_spared()

    def _flops_spared(self) -> int:
        """What the last block does not compute: all but keys and values of all tokens but the class token."""
        d_model, others = self.pos_embed.shape[-1], self.tokens - 1
        linear = sum(m.weight.numel() for m in self.blocks[-1].modules() if isinstance(m, nn.Linear)) - 2 * d_model**2
        maps = [self.attention_class.map_flops(d_model, self.tokens, queries) for queries in (None, 1)]
        return 2 * others * linear + maps[0] - maps[1]


def _initialise_parameter(name: str, value: Tensor, generator: torch.Generator) -> None:
    if name.endswith("pos_embed"):
        value.normal_(0.0, 0.02, generator=generator)
    elif name.endswith(("cls_token", "bias")):
        value.zero_()
    elif value.ndim == 1:  # the weight of a norm
        value.fill_(1.0)
    else:
        # Query, key and value lie in one matrix for speed and are drawn as the square ones that they are.
        for matrix in value.split(value.shape[1]) if name.endswith("qkv.weight") else [value.flatten(1)]:
            nn.init.xavier_uniform_(matrix, generator=generator)


def _call(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def project(qkv: nn.Linear, x_BND: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the first so many tokens, or of all, keys and values, whose matrices lie in one. [B, n, D], [B, N, D], [B, N, D]"""
    if queries is None:
        q_BND, k_BND, v_BND = qkv(x_BND).chunk(3, dim=-1)
        return q_BND, k_BND, v_BND
    D = qkv.in_features
    k_BND, v_BND = F.linear(x_BND, qkv.weight[D:], qkv.bias[D:]).chunk(2, dim=-1)
    return F.linear(x_BND[:, :queries], qkv.weight[:D], qkv.bias[:D]), k_BND, v_BND


def triton_supported(device: torch.device, dtype: torch.dtype, head_dim: int, maps: int) -> bool:
    """Whether attention_triton.py is installed and has kernels for this; see its `supported`."""
    if device.type != "cuda":  # importing Triton takes seconds
        return False
    try:
        from diffvit.kernels.attention_triton import supported
    except Exception:  # missing, or broken in one of many ways: there are other forms
        return False
    return supported(device, dtype, head_dim, maps)


def attend_by_triton(qkv: nn.Linear, x_BND: Tensor, heads: int, lambda_full: Tensor | None = None) -> Tensor:
    """attention_triton.py's attention of a linear layer's output, imported where it is used: not every system has Triton. [B, N, D]"""
    from diffvit.kernels.attention_triton import attend

    qkv_BN3D = F.linear(x_BND, qkv.weight, qkv.bias.detach()).unflatten(-1, (3, -1))  # attend gives the bias its gradient
    return attend(qkv_BN3D, heads, lambda_full, qkv.bias)


def set_form(model: nn.Module, form: str | None) -> None:
    """Have all of a model's layers compute attention in a form that they know, or None for the device's default."""
    for module in cast(list[Any], [*model.modules()]):
        if hasattr(module, "form"):
            module.form = form


def softmax_maps(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in fp32 or better."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def apply_to_values(maps_BMNN: Tensor, v_BMNV: Tensor) -> Tensor:
    """Heads' outputs side by side, from their explicit maps. [B, N, M V]"""
    return (maps_BMNN.to(v_BMNV.dtype) @ v_BMNV).transpose(1, 2).flatten(2)


def attention_class(model: str) -> AttentionClass:
    """The attention class of an architecture, built-in or of the user's own. Raises UserError for an unknown one."""
    model = resolve_model(model)
    if source := known_source(model):
        return source.attention_class
    module, _, name = MODELS[model].partition(":")
    return getattr(importlib.import_module(module), name)


def build_model(model: str, size: str, protocol: Protocol, device: str | torch.device = "cpu") -> VisionTransformer:
    """The architecture `model` at a size label of `protocol`; on the device "meta" it costs no memory."""
    with sentences(known_source(model)), torch.device(device):
        return VisionTransformer(
            attention_class(model),
            image_size=protocol.image_size,
            patch_size=protocol.patch_size,
            channels=protocol.channels,
            classes=protocol.classes,
            d_model=protocol.d_model,
            heads=protocol.heads,
            depth=protocol.depths[size],
            mlp_ratio=protocol.mlp_ratio,
            dropout=protocol.dropout,
            residual_scale=protocol.residual_scale,
            plain=known_source(model) is not None,
        )
