"""The connector: patch features of the tower in, N tokens of the language model's width out. Plain torch modules.

Modules take numbers; `build_connector` at the end is the only place that reads settings. Weights are always fp32 and
computed under autocast by the caller. Letters: M images, P patches, Dv tower width, N visual tokens, Dr resampler
width, Dh language-model width.
"""

import copy
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from beholder.config import ConnectorConfig
from beholder.types import UserError


class CrossAttention(nn.Module):
    """Latents attend to the patches and to one another: keys and values are [patches; latents], as in Flamingo."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_patches = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, latents: Float[Tensor, "m n d"], patches: Float[Tensor, "m p d"]) -> Float[Tensor, "m n d"]:
        m, n, d = latents.shape
        latents = self.norm_latents(latents)
        keys_values = self.kv(torch.cat([self.norm_patches(patches), latents], dim=1))
        k, v = keys_values.view(m, -1, 2, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q = self.q(latents).view(m, n, self.num_heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(m, n, d))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "m n d"]) -> Float[Tensor, "m n d"]:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Perceiver(nn.Module):
    """N learned latents read the patches over ``depth`` pre-norm blocks of cross-attention and feed-forward.

    After the Perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv:2204.14198) without time embeddings.
    ``[M, P, d_in] -> [M, num_latents, dim]``.

    **Why latents are drawn from N(0, 1).** The blocks are residual: what leaves them is latent + what attention wrote.
    With the usual 0.02 the latents are far smaller than what the first block adds, and that addition starts as nearly
    the same average of the patches for every latent (queries that differ by little attend alike); the final norm blows
    this common part up, and all N tokens leave as near copies of one another (mean cosine 0.98, against 0.16 at std 1),
    with near copies for gradients. At std 1 the latents differ from the first step and ask different questions. On the
    quickstart's parts, 100 steps of 16, the held-out loss is 0.25 at std 0.02, 0.21 at 0.2 and 0.13 at 1; at learning
    rate 1e-3 the gap is 19 % against 73 % of captions right. ``benchmarks/connector_init.py`` trains the choices side
    by side.
    """

    kind = "perceiver"

    def __init__(
        self, d_in: int, num_latents: int, depth: int, num_heads: int, dim: int, latent_std: float = 1.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(
                f"model.connector.resampler: width dim = {dim} is not divisible by num_heads = {num_heads}; choose one "
                f"of {[h for h in range(1, 33) if dim % h == 0]} heads or another dim"
            )
        self.d_out, self.latent_std = dim, latent_std
        self.latents = nn.Parameter(torch.empty(num_latents, dim))
        self.input = nn.Identity() if d_in == dim else nn.Linear(d_in, dim)
        self.attention = nn.ModuleList(CrossAttention(dim, num_heads) for _ in range(depth))
        self.feed_forward = nn.ModuleList(FeedForward(dim, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: Float[Tensor, "m p dv"]) -> Float[Tensor, "m n dr"]:
        patches = self.input(patches)
        latents = self.latents.expand(patches.shape[0], -1, -1)
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            latents = latents + attention(latents, patches)
            latents = latents + feed_forward(latents)
        return self.norm(latents)


class MeanPool(nn.Module):
    """The average patch: ``[M, P, D] -> [M, 1, D]``, no parameters."""

    kind = "mean_pool"

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.d_out = d_in

    def forward(self, patches: Float[Tensor, "m p d"]) -> Float[Tensor, "m 1 d"]:
        return patches.mean(1, keepdim=True)


class GridPool(nn.Module):
    """The square patch grid average-pooled to a smaller square: ``[M, s*s, D] -> [M, t*t, D]``, no parameters."""

    kind = "grid"

    def __init__(self, d_in: int, num_patches: int, num_tokens: int) -> None:
        super().__init__()
        self.d_out = d_in
        self.side_in, self.side_out = _side(num_patches, "patches"), _side(num_tokens, "visual tokens")
        if self.side_out > self.side_in:
            raise UserError(
                f"model.connector: grid cannot make {num_tokens} visual tokens out of {num_patches} patches; ask for "
                f"at most {num_patches}"
            )

    def forward(self, patches: Float[Tensor, "m p d"]) -> Float[Tensor, "m n d"]:
        m, _, d = patches.shape
        grid = patches.transpose(1, 2).reshape(m, d, self.side_in, self.side_in)
        return F.adaptive_avg_pool2d(grid, self.side_out).flatten(2).transpose(1, 2)


class PixelShuffle(nn.Module):
    """``factor x factor`` neighbouring patches stacked into one token of ``factor**2 * D`` channels, no parameters.

    Nothing is lost, N shrinks by ``factor**2`` (Shi et al. 2016, used this way by InternVL and Idefics3).
    """

    kind = "pixel_shuffle"

    def __init__(self, d_in: int, num_patches: int, factor: int) -> None:
        super().__init__()
        self.side, self.factor, self.d_out = _side(num_patches, "patches"), factor, d_in * factor * factor
        if self.side % factor:
            raise UserError(
                f"model.connector: a {self.side} x {self.side} patch grid cannot be divided by {factor}; possible "
                f"factors: {_divisors(self.side)}"
            )

    def forward(self, patches: Float[Tensor, "m p d"]) -> Float[Tensor, "m n d2"]:
        m, _, d = patches.shape
        f, t = self.factor, self.side // self.factor
        blocks = patches.view(m, t, f, t, f, d).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(m, t * t, f * f * d)


class Passthrough(nn.Module):
    """Every patch is a visual token."""

    kind = "none"

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.d_out = d_in

    def forward(self, patches: Float[Tensor, "m p d"]) -> Float[Tensor, "m p d"]:
        return patches


class MlpProjector(nn.Module):
    """Linear, GELU, dropout, linear: ``[M, N, Dr] -> [M, N, Dh]`` (LLaVA-1.5, Liu et al. 2023)."""

    kind = "mlp"

    def __init__(self, d_in: int, hidden: int, d_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, d_out)

    @property
    def last(self) -> nn.Linear:
        """The layer that writes the visual tokens."""
        return self.fc2

    def forward(self, x: Float[Tensor, "m n dr"]) -> Float[Tensor, "m n dh"]:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class LinearProjector(nn.Module):
    """One matrix, with an offset or without: ``[M, N, Dr] -> [M, N, Dh]``."""

    kind = "linear"

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(d_in, d_out, bias=bias)

    @property
    def last(self) -> nn.Linear:
        """The layer that writes the visual tokens."""
        return self.fc

    def forward(self, x: Float[Tensor, "m n dr"]) -> Float[Tensor, "m n dh"]:
        return self.fc(x)


class OutputNorm(nn.Module):
    """RMSNorm whose gain starts at the RMS of the language model's embedding table.

    A frozen language model has only ever seen inputs of that size (0.136 for SmolLM2, where a fresh projector writes
    about 0.3 to 1): larger rows drown the residual stream of the first layers, smaller ones are lost in it.
    """

    def __init__(self, dim: int, initial_rms: float) -> None:
        super().__init__()
        self.initial_rms = initial_rms
        self.weight = nn.Parameter(torch.full((dim,), float(initial_rms)))

    def forward(self, x: Float[Tensor, "m n d"]) -> Float[Tensor, "m n d"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-10)


Resampler = Perceiver | MeanPool | GridPool | PixelShuffle | Passthrough
Projector = MlpProjector | LinearProjector


class Connector(nn.Module):
    """``vision_ln`` (optional) → resampler → projector → output norm (optional): ``[M, P, Dv] -> [M, N, Dh]``."""

    def __init__(
        self,
        vision_ln: nn.LayerNorm | None,
        resampler: Resampler,
        projector: Projector,
        output_norm: OutputNorm | None,
        *,
        d_in: int,
        d_out: int,
        num_patches: int,
        num_tokens: int,
    ) -> None:
        super().__init__()
        self.vision_ln, self.resampler, self.projector, self.output_norm = vision_ln, resampler, projector, output_norm
        self.d_in, self.d_out, self.num_patches, self.num_tokens = d_in, d_out, num_patches, num_tokens

    def forward(self, patches: Float[Tensor, "m p dv"]) -> Float[Tensor, "m n dh"]:
        if patches.shape[1:] != (self.num_patches, self.d_in):
            raise UserError(
                f"the connector expects {self.num_patches} patches of width {self.d_in} per image but got "
                f"{patches.shape[1]} of width {patches.shape[2]}: the features come from another tower or resolution"
            )
        if patches.shape[0] == 0:
            # A text-only micro-batch: no tokens, but a graph to every weight, which data-parallel training asks for.
            anchor = torch.stack([p.float().sum() * 0.0 for p in self.parameters()]).sum()
            return anchor * patches.new_zeros(0, self.num_tokens, self.d_out, dtype=torch.float32)
        x = patches.float()
        if self.vision_ln is not None:
            x = self.vision_ln(x)
        x = self.projector(self.resampler(x))
        return x if self.output_norm is None else self.output_norm(x)

    def info(self) -> dict[str, object]:
        """The connector's shape in the config's words, for its checkpoint to say what it fits."""
        return {
            "vision_ln": self.vision_ln is not None, "resampler": self.resampler.kind,
            "projector": self.projector.kind, "output_norm": "rms" if self.output_norm is not None else "none",
            "num_visual_tokens": self.num_tokens, "num_patches": self.num_patches,
            "d_vision": self.d_in, "d_text": self.d_out,
        }  # fmt: skip

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from ``seed`` alone: the same on every rank, device and day.

        Linear weights U(±1/sqrt(fan_in)) (torch's default), biases and LayerNorm shifts 0, gains 1, the output gain at
        the embedding RMS, latents N(0, latent_std).
        """
        draw = torch.Generator().manual_seed(seed)
        for module in self.modules():
            match module:
                case nn.Linear():
                    bound = 1 / math.sqrt(module.in_features)
                    module.weight.copy_(torch.empty(module.weight.shape).uniform_(-bound, bound, generator=draw))
                    if module.bias is not None:
                        module.bias.zero_()
                case nn.LayerNorm():
                    module.weight.fill_(1.0)
                    module.bias.zero_()
                case OutputNorm():
                    module.weight.fill_(module.initial_rms)
                case Perceiver():
                    latents = torch.empty(module.latents.shape).normal_(0.0, module.latent_std, generator=draw)
                    module.latents.copy_(latents)
                case _:
                    pass


@torch.no_grad()
def without_output_norm(connector: Connector, factors: Float[Tensor, "dh"]) -> Connector:
    """A copy whose last linear layer gives each channel times its factor, in place of the output norm. Equal to the
    norm where every token has the same RMS, and ``factors`` are the gain over it."""
    folded = copy.deepcopy(connector)
    folded.output_norm = None
    last = folded.projector.last
    last.weight.copy_(last.weight.double() * factors.to(last.weight.device).unsqueeze(1))
    if last.bias is not None:
        last.bias.copy_(last.bias.double() * factors.to(last.bias.device))
    return folded


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _side(count: int, what: str) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(
            f"model.connector: {count} {what} do not form a square; resampler kinds grid and pixel_shuffle need one "
            "(kinds perceiver, mean_pool and none do not)"
        )
    return side


def resolve_num_tokens(cfg: ConnectorConfig, num_patches: int) -> int:
    """N, the visual tokens of one image, for this resampler kind and a tower of ``num_patches`` patches.

    Raises `UserError` when the number asked for is not possible with the kind.
    """
    asked = cfg.tokens_asked
    match cfg.resampler.kind:
        case "perceiver":
            assert asked is not None
            return asked
        case "mean_pool":
            possible = [1]
        case "none":
            possible = [num_patches]
        case "grid":
            side = _side(num_patches, "patches")
            possible = [s * s for s in range(1, side + 1)]
            asked = asked or min(64, num_patches)
        case "pixel_shuffle":
            side = _side(num_patches, "patches")
            possible = [(side // f) ** 2 for f in _divisors(side)]
            if asked is None and side % 2:
                raise UserError(
                    f"model.connector.num_visual_tokens: a {side} x {side} patch grid cannot be halved; set it to one "
                    f"of {possible} for resampler.kind pixel_shuffle"
                )
            asked = asked or (side // 2) ** 2
    if asked is not None and asked not in possible:
        raise UserError(
            f"model.connector.num_visual_tokens is {asked}, but resampler.kind {cfg.resampler.kind} makes "
            f"{' or '.join(map(str, possible))} tokens out of the tower's {num_patches} patches; set one of these or "
            "use another kind"
        )
    return possible[0] if asked is None else asked


def build_connector(
    cfg: ConnectorConfig,
    *,
    num_patches: int,
    d_vision: int,
    d_text: int,
    embed_rms: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> Connector:
    """The connector the settings ask for, in fp32, with weights drawn from ``seed`` (none are drawn on ``meta``)."""
    num_tokens = resolve_num_tokens(cfg, num_patches)
    r, p = cfg.resampler, cfg.projector
    with torch.device(device):
        resampler: Resampler
        match r.kind:
            case "perceiver":
                resampler = Perceiver(d_vision, num_tokens, r.depth, r.num_heads, r.dim or d_vision, r.latent_std)
            case "mean_pool":
                resampler = MeanPool(d_vision)
            case "grid":
                resampler = GridPool(d_vision, num_patches, num_tokens)
            case "pixel_shuffle":
                resampler = PixelShuffle(d_vision, num_patches, math.isqrt(num_patches // num_tokens))
            case "none":
                resampler = Passthrough(d_vision)
        projector: Projector
        match p.kind:
            case "mlp":
                projector = MlpProjector(resampler.d_out, p.hidden or d_text, d_text, p.dropout)
            case "linear":
                projector = LinearProjector(resampler.d_out, d_text, p.bias)
        connector = Connector(
            nn.LayerNorm(d_vision) if cfg.vision_ln else None,
            resampler,
            projector,
            OutputNorm(d_text, embed_rms) if cfg.output_norm == "rms" else None,
            d_in=d_vision, d_out=d_text, num_patches=num_patches, num_tokens=num_tokens,
        )  # fmt: skip
    if torch.device(device).type != "meta":
        connector.reset_parameters(seed)
    return connector
