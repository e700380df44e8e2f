"""MaskAlign in one file: masked image modelling by alignment, without reconstruction.

Paper: Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction",
CVPR 2023, arXiv 2211.08887. A student ViT sees 30 % of an image's patches and learns to align its
features, through a learnable Dynamic Alignment matrix, with those that a frozen teacher draws from
the whole image. There is no mask token and no decoder.

Symbols   B batch   N patches   V visible patches   D student width   E teacher width
          S student depth       T teacher depth     K aligned teacher levels
Images    RGB [B,3,H,W], uint8 or float in [0,1]; each network normalises for itself.
Tokens    [CLS] comes first: [B,1+N,C] for whole images, [B,1+V,C] for visible patches.
Masks     are index tensors `keep` [B,V] of the VISIBLE patches; there are no boolean masks.

Read from top to bottom: 3.1 the two networks, 3.2 which patches the student sees, 3.3 how the two
are aligned; `MaskAlign.forward` at the end is the paper's figure. `Deviation:` marks each place
where this file departs from the paper or fills its silence.
"""
import math
import warnings
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import nn

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VITS = {  # timm's names and sizes; the last one is for the built-in digits
    "vit_tiny_patch16_224": dict(image_size=224, patch_size=16, dim=192, depth=12, heads=3),
    "vit_small_patch16_224": dict(image_size=224, patch_size=16, dim=384, depth=12, heads=6),
    "vit_base_patch16_224": dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12),
    "vit_large_patch16_224": dict(image_size=224, patch_size=16, dim=1024, depth=24, heads=16),
    "vit_digits_patch4_32": dict(image_size=32, patch_size=4, dim=64, depth=4, heads=4),
}
HUB_WEIGHTS = {  # (name, tag) -> address; DINO is the paper's second teacher
    ("vit_small_patch16_224", "dino"): "https://dl.fbaipublicfiles.com/dino/"
    "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ("vit_base_patch16_224", "dino"): "https://dl.fbaipublicfiles.com/dino/"
    "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
}


# --- 3.1 Model structure: the student -----------------------------------------------------------

def pair(size):
    """An int or (height, width) -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def normalise(images, mean, std):
    """Images [B,3,H,W], uint8 or float in [0,1] -> floats, less `mean`, over `std`, by channel."""
    images = images / 255 if images.dtype == torch.uint8 else images
    # channel by channel: a tensor of means would be copied from the host on each call
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


def sincos_2d(dim, grid):
    """Width and (rows, columns) of the patch grid, or one int -> fixed positions [1+N, dim].

    The first half of the channels encodes the column, the second the row, each as sines, then
    cosines; row 0, [CLS]'s, is zero. Raises ValueError if 4 does not divide dim.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {dim}")
    # ω_i = 10000^(−i / (dim/4))
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in pair(grid))
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    angles = [einsum(p.flatten(), omega, "n, i -> n i") for p in (columns, rows)]
    table = torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()


def take(tokens, keep):
    """Tokens [B,1+N,C], keep [B,V] -> [B,1+V,C]: [CLS] and the kept patches, in keep's order."""
    rows = F.pad(keep + 1, (1, 0))  # [CLS] is row 0, patch i is row 1+i
    return tokens.gather(1, repeat(rows, "b v -> b v c", c=tokens.shape[-1]))


class PatchEmbed(nn.Module):
    """Patches [B,V,3·P·P] -> [B,V,D]. A Conv2d holds the weight, as in timm; on patches that are
    already cut out it is a matrix product, and only visible patches pay for it."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, [B,N,D] -> [B,N,D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two layers with exact GELU, [B,N,D] -> [B,N,D]."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block, [B,N,D] -> [B,N,D]; `gates` weigh its two residual branches."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x, gates):
        x = torch.addcmul(x, gates[0], self.attn(self.norm1(x)))
        return torch.addcmul(x, gates[1], self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A plain Vision Transformer with timm's parameter names; sizes are ints or (height, width).

    `norm` belongs to timm's format, so that encoders travel; no level passes through it and it
    is not trained. Raises ValueError if the patches do not tile the image or the heads the width.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0):
        super().__init__()
        self.image_size, self.patch_size, self.dim = pair(image_size), patch_size, dim
        if any(side < patch_size or side % patch_size for side in self.image_size) or dim % heads:
            raise ValueError(f"patches of {patch_size} do not tile an image of {self.image_size}, "
                             f"or {heads} heads do not divide a width of {dim}")
        self.grid = tuple(side // patch_size for side in self.image_size)
        self.drop_rates = torch.linspace(0, drop_path, depth).tolist()
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6).requires_grad_(False)
        self.apply(xavier)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    def gates(self, batch, noise, device):
        """Drop path: noise [B,2S], uniform in [0,1), or None -> S pairs of gates, each [B,1,1]:
        0 with the block's probability p, else 1/(1−p); 1 in eval mode."""
        if not self.training or not any(self.drop_rates):
            return [torch.ones(2, 1, 1, 1, device=device)] * len(self.blocks)
        noise = torch.rand(batch, 2 * len(self.blocks), device=device) if noise is None else noise
        noise = rearrange(noise, "b (s two) -> s two b 1 1", two=2)
        return [(u >= p) / (1 - p) for u, p in zip(noise, self.drop_rates)]

    def forward(self, images, keep=None, noise=None):
        """Images [B,3,H,W], keep [B,V] or None for all -> list of S tensors [B,1+V,D], every
        block's output, without a final norm. noise: see `gates`. Raises ValueError on other sizes.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])}, not {self.image_size}")
        images = normalise(images, *IMAGENET_MEAN_STD).to(self.cls_token.dtype)
        p = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        position = self.pos_embed.expand(len(images), -1, -1)
        if keep is not None:
            patches = patches.gather(1, repeat(keep, "b v -> b v c", c=patches.shape[-1]))
            position = take(position, keep)
        cls = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([cls, self.patch_embed(patches)], dim=1) + position
        levels = []
        for block, gates in zip(self.blocks, self.gates(len(images), noise, images.device)):
            x = block(x, gates)
            levels.append(x)
        return levels


def xavier(module):
    """Initialise a Linear as the official code does: Xavier-uniform weight, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def vit(name, **overrides):
    """A ViT of a named size, sizes overridden by keyword. Raises ValueError on an unknown name."""
    if name not in VITS:
        raise ValueError(f"unknown ViT {name!r}; there are {', '.join(VITS)}")
    return ViT(**{**VITS[name], **overrides})


# --- Weights: reading files of others, and our own ----------------------------------------------

def read_weights(path):
    """A checkpoint file -> its contents; tensors and primitives only, no code is ever run.

    Raises ValueError, with the file's name, if it is missing, damaged or holds anything else.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is no readable file of plain weights: {reason}") from error


def encoder_weights(state):
    """Contents of a checkpoint (ours, timm's, MAE's, DINO's or the official MaskAlign release's)
    -> (the encoder's tensors by timm's names, the names left aside)."""
    for key in ("student", "model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        return {}, []
    for prefix in ("module.", "model.", "backbone."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    beside = ("head", "fc_norm", "decoder_", "mask_token", "distill_", "clip_model", "dino_model")
    aside = [key for key in state if key.startswith(beside)]
    return {key: value for key, value in state.items() if key not in aside}, aside


def resample_positions(positions, old, new):
    """Positions [1,1+n,C] on the grid `old` (rows, columns) -> [1,1+m,C] on the grid `new`;
    bicubic, as the official code does for CLIP-L/14. [CLS]'s stays."""
    if tuple(old) == tuple(new):
        return positions
    grid = rearrange(positions[:, 1:], "1 (h w) c -> 1 c h w", h=old[0], w=old[1])
    grid = F.interpolate(grid.float(), tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "1 c h w -> 1 (h w) c")], dim=1)


def load_strict(module, state, source):
    """Load a state dict; raises ValueError that names the first keys or shapes that differ."""
    own = module.state_dict()
    odd = [f"{key} is missing" for key in own if key not in state]
    odd += [f"{key} is not the model's" for key in state if key not in own]
    odd += [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in own
            if key in state and state[key].shape != own[key].shape]
    if odd:
        raise ValueError(f"{source} does not fit the model: {'; '.join(odd[:3])}"
                         + f"; and {len(odd) - 3} more" * (len(odd) > 3))
    module.load_state_dict(state)


def load_encoder(network, state, source):
    """Load a checkpoint's contents (see `encoder_weights`) strictly into a ViT, resampling its
    positions -> the names left aside. Raises ValueError as `load_strict` does."""
    state, aside = encoder_weights(state)
    positions = state.get("pos_embed")
    if positions is not None and positions.shape[1] != 1 + math.prod(network.grid):
        side = math.isqrt(positions.shape[1] - 1)
        if side * side != positions.shape[1] - 1:
            raise ValueError(f"{source}: {positions.shape[1] - 1} positions are no square grid")
        state["pos_embed"] = resample_positions(positions, (side, side), network.grid)
    load_strict(network, state, source)
    return aside


# --- 3.1 Model structure: the frozen teacher ----------------------------------------------------

def cls_attention(x, attn):
    """Input [B,1+N,E] of a self-attention module -> attention [B,N], fp32, of [CLS] to the
    patches, averaged over heads. q, k and v are packed in this order in both kinds of module."""
    packed = (attn.qkv.weight, attn.qkv.bias) if hasattr(attn, "qkv") else (
        attn.in_proj_weight, attn.in_proj_bias)
    (w_q, w_k, _), (b_q, b_k, _) = (rearrange(p, "(qkv e) ... -> qkv e ...", qkv=3) for p in packed)
    q = rearrange(F.linear(x[:, 0], w_q, b_q), "b (h d) -> b h d", h=attn.num_heads)
    k = rearrange(F.linear(x, w_k, b_k), "b n (h d) -> b n h d", h=attn.num_heads)
    # a = mean_h softmax(q_cls·k / √d): one row for each head, never the N×N map
    logits = einsum(q.float(), k.float(), "b h d, b n h d -> b h n") / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1)[:, :, 1:].mean(dim=1)


class Teacher(nn.Module):
    """A ViT that is frozen for good: eval even after .train(), no gradients.

    network is called with images, normalised by mean_std; `blocks` are its Transformer blocks,
    `attn` the last one's attention module. Hooks on these, owned here and registered once, before
    any compile, collect the last `levels` blocks' outputs. Raises ValueError unless
    1 <= levels <= depth.
    """

    def __init__(self, network, blocks, attn, image_size, grid, dim, levels, mean_std):
        super().__init__()
        if not 1 <= levels <= len(blocks):
            raise ValueError(f"levels must be from 1 to the teacher's depth {len(blocks)}, "
                             f"not {levels}")
        self.network, self.attn = network, [attn]  # in a list: registered once, under network
        self.image_size, self.grid, self.mean_std = pair(image_size), tuple(grid), mean_std
        self.dim, self.depth, self.levels = dim, len(blocks), levels
        self._levels, self._attn_input = [], []
        for block in blocks[-levels:]:
            block.register_forward_hook(lambda module, args, out: self._levels.append(out))
        attn.register_forward_pre_hook(lambda module, args: self._attn_input.append(args[0]))
        self.requires_grad_(False).train()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        """Images [B,3,H,W] -> (list of K raw block outputs [B,1+N,E], attention [B,N] of the last
        layer). Images of another size are resized (bicubic) to the teacher's own."""
        dtype = next(self.network.parameters()).dtype
        self._levels.clear()
        self._attn_input.clear()
        images = images / 255 if images.dtype == torch.uint8 else images
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", align_corners=False)
        self.network(normalise(images, *self.mean_std).to(dtype))
        levels, attention = list(self._levels), cls_attention(self._attn_input[0], self.attn[0])
        self._levels.clear()
        self._attn_input.clear()
        return levels, attention


def load_teacher(name, weights=None, levels=5):
    """An open_clip model's image tower or a name in VITS -> Teacher of the last `levels` levels.

    weights: a pretrained tag (open_clip's, or "dino" for VITS), a file, or None for random values.
    Raises ValueError if the name, the tag or the file is not usable, saying what would be.
    """
    import open_clip  # here, since it takes seconds and a ViT of ours does not need it
    if weights is None:
        warnings.warn(f"teacher {name} has random weights: fit for tests and timing only")
    if name in VITS:
        network = vit(name)
        if weights is not None:
            load_encoder(network, fetch_weights(name, weights, HUB_WEIGHTS.get((name, weights))),
                         weights)
        return Teacher(network, network.blocks, network.blocks[-1].attn, network.image_size,
                       network.grid, network.dim, levels, ((0, 0, 0), (1, 1, 1)))
    if name not in open_clip.list_models():
        known = [*VITS, *(m for m in open_clip.list_models() if m.startswith("ViT-"))]
        raise ValueError(f"unknown teacher {name!r}; there are {', '.join(known)}")
    config = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" in config or not isinstance(config["layers"], int):
        raise ValueError(f"teacher {name} has no [CLS] token in a plain ViT, as MaskAlign needs")
    tag = check_tag(name, weights)
    state = None if weights is None else fetch_weights(name, weights, tag)
    network = open_clip.create_model(name).visual
    if state is not None:
        visual = {key.removeprefix("visual."): value for key, value in state.items()
                  if key.startswith("visual.")} if isinstance(state, dict) else {}
        load_strict(network, visual, weights)
    # Deviation: the official code does this for CLIP-L/14 alone. A patch of 14 stands for one of
    # the student's 16 pixels: the image is resized by 14/16, and the positions with it.
    old, patch = network.grid_size, network.patch_size[0]
    size = tuple(side * 14 // 16 if patch == 14 else side for side in network.image_size)
    grid = tuple(side // patch for side in size)
    positions = resample_positions(network.positional_embedding.data[None], old, grid)
    network.positional_embedding = nn.Parameter(positions[0])
    blocks = network.transformer.resblocks
    mean_std = [(tag or {}).get(key, default) for key, default in zip(
        ("mean", "std"), (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))]
    return Teacher(network, blocks, blocks[-1].attn, size, grid, blocks[0].ln_1.weight.shape[0],
                   levels, mean_std)


def check_tag(name, tag):
    """open_clip's entry for a pretrained tag, or None for a file and for random weights.

    Raises ValueError, naming the right model, if model and weights disagree about QuickGELU:
    open_clip only warns, and the features are then silently wrong.
    """
    import open_clip
    if tag is None or Path(tag).is_file():
        return None
    twin = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    for model in (name, twin):
        entry = open_clip.get_pretrained_cfg(model, tag)
        config = open_clip.get_model_config(model) if entry else {}
        if entry and config.get("quick_gelu", False) == entry.get("quick_gelu", False):
            if model == name:
                return entry
            raise ValueError(f"weights {tag!r} do not have {name}'s activation; use {model}")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise ValueError(f"{tag!r} is neither a file nor a tag of {name}, which has {tags}")


def fetch_weights(name, weights, source):
    """Contents of a file, or of a tag's download: source is an address or open_clip's entry."""
    if Path(weights).is_file():
        return read_weights(weights)
    if source is None:
        known = ", ".join(tag for model, tag in HUB_WEIGHTS if model == name) or "none"
        raise ValueError(f"{weights!r} is neither a file nor a tag of {name}, which has {known}")
    try:
        if isinstance(source, str):
            return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        import open_clip
        path = open_clip.download_pretrained(source)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"weights {weights!r} of {name} could not be downloaded ({reason}); fetch "
                         "them elsewhere and pass the file: --teacher-weights FILE") from error
    return read_weights(path)


# --- 3.2 Masking strategy -----------------------------------------------------------------------

def visible(patches, ratio):
    """V = ⌊N(1−r)⌋, in exact arithmetic (floats make 0 of 10 patches at r = 0.9). Raises
    ValueError unless 0 <= r < 1 and V >= 1."""
    if not 0 <= ratio < 1 or (count := int(patches * (1 - Fraction(str(ratio))))) < 1:
        raise ValueError(f"mask ratio {ratio} leaves no visible patch of {patches}")
    return count


def attentive_keep(attention, ratio, noise=None):
    """Attention [B,N] of [CLS], noise [B,N] uniform in [0,1) or None to draw it -> keep [B,V].

    V patches without replacement with probability proportional to attention, so that salient ones
    are kept more often. Patches with zero attention come last.
    """
    attention = attention.float()
    noise = torch.rand_like(attention) if noise is None else noise
    # Deviation: the Gumbel top-k trick draws from the official code's multinomial distribution
    # without its wait for the GPU, and also when fewer than V weights are positive.
    # keep = top-V of log a_n + g_n,  g_n = −log(−log u_n)
    gumbel = -torch.log(-torch.log(noise.clamp(min=1e-20)))
    return (attention.log() + gumbel).topk(visible(attention.shape[1], ratio), dim=1).indices


def random_keep(batch, patches, ratio, device=None, noise=None):
    """B, N -> keep [B,V], uniform without replacement: attention that is the same everywhere."""
    return attentive_keep(torch.ones(batch, patches, device=device), ratio, noise)


# --- 3.3 Dynamic alignment ----------------------------------------------------------------------

def whiten(y):
    """Teacher features [...,E] -> [...,E] with mean 0 and variance 1: LayerNorm, no affine."""
    return F.layer_norm(y.to(torch.promote_types(y.dtype, torch.float32)), y.shape[-1:], eps=1e-5)


def align_loss(pred, target):
    """Prediction and whitened target, both [...,E] -> scalar, in fp32 or finer.

    Raises ValueError if their shapes differ, which would broadcast.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred is {tuple(pred.shape)}, target {tuple(target.shape)}")
    # L(ŷ, ȳ) = ½(ŷ−ȳ)² if |ŷ−ȳ| <= 1 else |ŷ−ȳ| − ½, mean over tokens and channels
    return F.smooth_l1_loss(pred.to(torch.promote_types(pred.dtype, torch.float32)), target)


class DynamicAlignment(nn.Module):
    """Mixes the S student levels for each of the K teacher levels and maps D to E.

    `matrix` [K,S] is the paper's Dynamic Alignment matrix. Deviation: only the K rows and adaptors
    that the loss reaches exist (the official code builds and runs T of them), and S need not be T:
    each row starts with its 1 at evenly matched depth, the identity's rows when S = T.
    Raises ValueError unless 1 <= levels <= teacher_depth.
    """

    def __init__(self, student_depth, student_dim, teacher_depth, teacher_dim, levels):
        super().__init__()
        if not 1 <= levels <= teacher_depth:
            raise ValueError(f"levels must be from 1 to {teacher_depth}, not {levels}")
        self.matrix = nn.Parameter(torch.full((levels, student_depth), 0.01))
        for k, level in enumerate(range(teacher_depth - levels + 1, teacher_depth + 1)):
            match = math.ceil(level * student_depth / teacher_depth)  # both count from 1
            self.matrix.data[k, match - 1] += 1
        self.adaptors = nn.ModuleList(nn.Linear(student_dim, teacher_dim) for _ in range(levels))
        self.apply(xavier)

    def forward(self, features):
        """List of S tensors [B,1+V,D] -> list of K tensors [B,1+V,E]."""
        # ŷ_k = A_k( Σ_s W_ks x_s )
        mixed = einsum(self.matrix, torch.stack(features), "k s, s b v d -> k b v d")
        return [adaptor(x) for adaptor, x in zip(self.adaptors, mixed)]


class MaskAlign(nn.Module):
    """The trained side of the method: a student ViT and its Dynamic Alignment to a Teacher.

    Reads the teacher's sizes and does not own it, so that it enters no checkpoint or optimiser.
    mask: "attentive" or "random". Raises ValueError if the patch grids differ, the ratio leaves no
    visible patch, or the mask is unknown.
    """

    def __init__(self, student, teacher, mask="attentive", mask_ratio=0.7):
        super().__init__()
        if student.grid != teacher.grid:
            raise ValueError(f"the student's patch grid is {student.grid}, the teacher's "
                             f"{teacher.grid}")
        if mask not in ("attentive", "random"):
            raise ValueError(f"mask must be attentive or random, not {mask!r}")
        visible(math.prod(student.grid), mask_ratio)
        self.student, self.mask, self.mask_ratio = student, mask, mask_ratio
        self.align = DynamicAlignment(len(student.blocks), student.dim,
                                      teacher.depth, teacher.dim, teacher.levels)

    def forward(self, images, levels, attention, keep=None, noise=None):
        """Images [B,3,H,W], and what the Teacher says of them: K levels [B,1+N,E] and attention
        [B,N] -> scalar loss. keep [B,V] overrides the mask. noise [B,N+2S], uniform in [0,1),
        decides the mask and the student's drop path; None draws it."""
        batch, patches = attention.shape
        mask_noise, path_noise = (None, None) if noise is None else (
            noise[:, :patches], noise[:, patches:])
        if keep is None and self.mask == "attentive":
            keep = attentive_keep(attention, self.mask_ratio, mask_noise)       # 3.2
        elif keep is None:
            keep = random_keep(batch, patches, self.mask_ratio, images.device, mask_noise)
        features = self.student(images, keep, path_noise)                       # 3.1: S × [B,1+V,D]
        predictions = self.align(features)                                      # 3.3: K × [B,1+V,E]
        targets = [whiten(take(y, keep)) for y in levels]                       #      K × [B,1+V,E]
        # L = 1/K Σ_k L(ŷ_k, ȳ_k)
        return torch.stack([align_loss(*pair) for pair in zip(predictions, targets)]).mean()
