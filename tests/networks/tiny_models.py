"""Small real modules with the class and attribute names that networks look for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

WIDTH = 16
TEXT_WIDTH = 8


class Modulation(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, count * width)


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class DoubleStreamBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.img_attn = SelfAttention(width)
        self.img_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = SelfAttention(width)
        self.txt_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        img_mod = self.img_mod.lin(vec)[:, None].chunk(6, dim=-1)
        txt_mod = self.txt_mod.lin(vec)[:, None].chunk(6, dim=-1)
        img = img + img_mod[2] * self.img_attn(img * (1 + img_mod[1]) + img_mod[0])
        img = img + img_mod[5] * self.img_mlp(img * (1 + img_mod[4]) + img_mod[3])
        txt = txt + txt_mod[2] * self.txt_attn(
            txt * (1 + txt_mod[1]) + txt_mod[0] + img.mean(1, keepdim=True)
        )
        txt = txt + txt_mod[5] * self.txt_mlp(txt * (1 + txt_mod[4]) + txt_mod[3])
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 7 * width)
        self.linear2 = nn.Linear(5 * width, width)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale, gate = self.modulation.lin(vec)[:, None].chunk(3, dim=-1)
        qkv, mlp = self.linear1(x * (1 + scale) + shift).split([3 * WIDTH, 4 * WIDTH], dim=-1)
        attention = nn.functional.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + gate * self.linear2(torch.cat([attention, nn.functional.gelu(mlp)], dim=-1))


class Embedder(nn.Module):
    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(given, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class TinyFlux(nn.Module):
    """`depth` blocks of each kind; forward takes img [B, N, 4], txt [B, L, 8], vec [B, 8] -> [B, N, 4]."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.img_in = nn.Linear(4, WIDTH)
        self.time_in = Embedder(8, WIDTH)
        self.vector_in = Embedder(8, WIDTH)
        self.guidance_in = Embedder(8, WIDTH)
        self.txt_in = nn.Linear(TEXT_WIDTH, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(WIDTH) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(WIDTH) for _ in range(depth))
        self.final_layer = nn.Linear(WIDTH, 4)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        count = txt.shape[1]
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(vec) + self.vector_in(vec) + self.guidance_in(vec)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec)
        return self.final_layer(x[:, count:])


class ClipL(nn.Module):
    """A CLIP text model under the attribute path of Kohya's key names, in transformers 4 and 5."""

    def __init__(self) -> None:
        super().__init__()
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=32,
                hidden_size=TEXT_WIDTH,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=8,
                eos_token_id=2,
            )
        )
        self.text_model = getattr(model, "text_model", model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(input_ids=ids).pooler_output


def tiny_t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(
            vocab_size=32,
            d_model=TEXT_WIDTH,
            d_kv=4,
            d_ff=16,
            num_heads=2,
            num_layers=1,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


class Rig:
    """A transformer with both encoders, the same in every call, and one forward through all of them."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.flux, self.clip, self.t5 = TinyFlux().to(dtype), ClipL().to(dtype), tiny_t5().to(dtype)
        for model in (self.flux, self.clip, self.t5):
            model.requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(seed + 1)
        self.img = torch.randn(2, 6, 4, generator=generator).to(dtype)
        self.ids = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 2, 2]])

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [self.clip, self.t5]

    def output(self) -> Tensor:
        """[2, 6, 4]"""
        text = self.t5(input_ids=self.ids).last_hidden_state
        return self.flux(self.img, text, self.clip(self.ids))
