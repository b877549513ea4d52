"""`run.py check`: all built-in architectures and the example pass, and each property finds what breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffvit.protocol import MODELS
from diffvit.soundness import cells_of, check_architecture

EXAMPLE = Path(__file__).resolve().parents[1] / "docs/examples/sigmoid_attention.py"


@pytest.mark.parametrize("model", MODELS)
def test_the_built_in_architectures_pass(model: str) -> None:
    assert [each.line() for each in check_architecture(cells_of(model)) if not each.holds] == []


def test_the_example_passes_at_every_size_of_every_data_set(cli) -> None:
    checked = cli("check", f"{EXAMPLE}:SigmoidAttention")
    assert checked.code == 0 and checked.out.count("\nyes ") == 7 and checked.out.startswith("yes  shapes"), checked.out
    assert "all 1025 tokens" in checked.out


HEAD = "import torch\nfrom torch import nn\nfrom diffvit.vit_classic import Attention\n\nclass Mine(Attention):\n"
INIT = "    def __init__(self, d_model, heads, layer, dropout):\n        super().__init__(d_model, heads, layer, dropout)\n"
# What is wrong -> the properties that do not hold, and a part of what is said
BROKEN = {
    "    def heads_output(self, x, queries=None):\n        return super().heads_output(x)[:, 1:]\n": ("shapes", "layer 0 gives [2, 16, 64]"),
    "    def heads_output(self, x, queries=None):\n        return super().heads_output(x)[:, -(queries or 0):]\n": ("shapes", "another value"),
    INIT + "        self.more = nn.Linear(d_model, d_model)\n"
    "    def heads_output(self, x, queries=None):\n        return super().heads_output(self.more(x), queries)\n": ("parameters", "%): "),
    "    @staticmethod\n    def map_flops(d_model, tokens, queries=None):\n        return 0\n": ("FLOPs", "torch counts"),
    INIT + "        self.idle = nn.Parameter(torch.zeros(3))\n": ("gradients", "blocks.0.attn.idle, blocks.1.attn.idle has none"),
    "    def heads_output(self, x, queries=None):\n        y = super().heads_output(x, queries)\n        return y + (y - y).abs().sqrt()\n":
        ("gradients", "not finite"),
    "    def heads_output(self, x, queries=None):\n        return super().heads_output(x + 0.1 * torch.rand_like(x), queries)\n":
        ("determinism", "differs"),
    INIT + "        self.register_buffer('drawn', torch.randn(d_model))\n": ("determinism", "blocks.0.attn.drawn differs"),
    "    def heads_output(self, x, queries=None):\n        return super().heads_output(x - x.mean(0), queries)\n": ("images", "beside other"),
    "    def heads_output(self, x, queries=None):\n        return super().heads_output(x, queries).lerp(x[:, :queries].float(), 0.5)\n":
        ("bf16", "line 7 of mine.py raised RuntimeError"),
    "    def heads_output(self, x, queries=None):\n        return 2 * super().heads_output(x, queries)\n": ("attention maps", "from forward"),
}  # fmt: skip


@pytest.mark.parametrize("body", BROKEN)
def test_a_property_finds_what_breaks_it(cli, body: str) -> None:
    name, said = BROKEN[body]
    Path("mine.py").write_text(HEAD + body)
    checked = cli("check", "mine.py:Mine", "--grid", "digits")
    assert checked.code == 1, checked.out
    (line,) = [line for line in checked.out.splitlines() if line.startswith(f"no   {name}")]
    assert said in line, checked.out


def test_maps_need_not_be_offered_and_a_bad_name_is_bad_input(cli) -> None:
    body = "    def maps(self): ...\n    logits = maps = property(lambda self: object.missing)\n"
    Path("mine.py").write_text(HEAD + body)
    checked = cli("check", "mine.py:Mine", "--grid", "digits")
    assert checked.code == 0 and "-    attention maps              not offered (logits, maps): " in checked.out, checked.out
    assert cli("check", "mine.py:Other").code == cli("check", "none").code == 2
