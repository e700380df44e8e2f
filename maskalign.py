"""MaskAlign: masked image modelling by alignment, without reconstruction.
Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", CVPR 2023, arXiv
2211.08887, in its order: 3.1 model, 3.2 masking, 3.3 alignment; MaskAlign.forward is its figure.

Symbols   B batch   N patches   V visible patches   D student width   E teacher width
          S student depth       K aligned teacher levels
Images    RGB [B,3,H,W], uint8 or float in [0,1]; each network normalises for itself.
Tokens    [CLS] comes first: [B,1+N,C] for whole images, [B,1+V,C] for visible patches.
Masks     are indices `keep` [B,V] of the VISIBLE patches. Noise is uniform in [0,1) and optional.
`Deviation:` marks departures from paper and official code. Errors of use are ValueErrors.
"""
import math, warnings, zipfile
from collections import OrderedDict
from fractions import Fraction
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from timm.layers import resample_abs_pos_embed, to_2tuple as pair  # an int or a pair -> a pair
from torch import nn

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VITS = {  # timm's names; the last is for the built-in digits
    "vit_tiny_patch16_224": dict(image_size=224, patch_size=16, dim=192, depth=12, heads=3),
    "vit_small_patch16_224": dict(image_size=224, patch_size=16, dim=384, depth=12, heads=6),
    "vit_base_patch16_224": dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12),
    "vit_large_patch16_224": dict(image_size=224, patch_size=16, dim=1024, depth=24, heads=16),
    "vit_digits_patch4_32": dict(image_size=32, patch_size=4, dim=64, depth=4, heads=4)}
DINO = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
ASIDE = ("head", "fc_norm", "decoder_", "mask_token", "distill_", "clip_model", "dino_model")

# --- 3.1 Model structure: the student -----------------------------------------------------------
def normalise(images, mean, std):
    """Images [B,3,H,W], uint8 or float in [0,1] -> float, less mean and over std by channel."""
    images = images / 255 if images.dtype == torch.uint8 else images
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)

def sincos_2d(dim, grid):
    """Width and (rows, columns) of the patch grid, or an int -> fixed positions [1+N,dim]: sines,
    then cosines, of the column in the first half, of the row in the second; zeros for [CLS]."""
    # ω_i = 10000^(−i/(dim/4))
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*map(torch.arange, pair(grid)), indexing="ij")
    angles = [einsum(at.flatten().double(), omega, "n, i -> n i") for at in (columns, rows)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()

def take(tokens, keep):
    """Tokens [B,1+N,C], keep [B,V] -> [B,1+V,C]: [CLS] and the kept patches, in keep's order."""
    rows = F.pad(keep + 1, (1, 0))  # row 0 is [CLS], row 1+i patch i
    return tokens.gather(1, repeat(rows, "b v -> b v c", c=tokens.shape[-1]))

class Attention(nn.Module):
    """Multi-head self-attention, [B,N,D] -> [B,N,D]."""
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

class Block(nn.Module):
    """Pre-norm Transformer block, [B,N,D] -> [B,N,D]; two gates [B,1,1] weigh its branches."""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
    def forward(self, x, gates):
        x = torch.addcmul(x, gates[0], self.attn(self.norm1(x)))  # x + gate · branch(x)
        return torch.addcmul(x, gates[1], self.mlp(self.norm2(x)))

class ViT(nn.Module):
    """A plain Vision Transformer, timm's parameter names; image_size: an int or (height, width)."""
    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0):
        super().__init__()
        self.image_size, self.patch_size, self.dim = pair(image_size), patch_size, dim
        self.grid = tuple(side // patch_size for side in self.image_size)
        if any(side % patch_size for side in self.image_size) or dim % heads or dim % 4:
            raise ValueError("patches must tile the image, heads and 4 divide the width")
        self.drop_rates = torch.linspace(0, drop_path, depth).tolist()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6).requires_grad_(False)  # for timm's sake, unused
        self.apply(initialise)
    def gates(self, images, noise):
        """Drop path: noise [B,2S] -> two gates [B,1,1] a block: 0 by chance p, or 1/(1−p)."""
        rates = [p * self.training for p in self.drop_rates]
        if noise is None:
            draw = torch.rand if any(rates) else torch.ones
            noise = draw(len(images), 2 * len(rates), device=images.device)
        noise = rearrange(noise, "b (s two) -> s two b 1 1", two=2)
        return [(u >= p).to(images.dtype) / (1 - p) for u, p in zip(noise, rates)]
    def forward(self, images, keep=None, noise=None):
        """Images [B,3,H,W], keep [B,V] or None for all patches, noise [B,2S] -> list of S tensors
        [B,1+V,D]: every block's output, without a final norm."""
        images = normalise(images, *IMAGENET_MEAN_STD).to(self.cls_token.dtype)
        patches = rearrange(self.patch_embed["proj"](images), "b d h w -> b (h w) d")
        cls = self.cls_token.expand(len(images), -1, -1)
        x, levels = torch.cat([cls, patches], dim=1) + self.pos_embed, []
        if keep is not None:  # before the first block, so that a dropped patch costs nothing there
            x = take(x, keep)
        for block, gates in zip(self.blocks, self.gates(images, noise)):
            x = block(x, gates)
            levels.append(x)
        return levels

def initialise(module):
    """A layer's initial values, as in the official code: Xavier-uniform weights, zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

def vit(name, **overrides):
    """A ViT of a size in VITS, with sizes overridden by keyword."""
    if name not in VITS:
        raise ValueError(f"unknown ViT {name!r}; there are {', '.join(VITS)}")
    return ViT(**VITS[name] | overrides)

def read_weights(source):
    """A checkpoint's file or https address -> its tensors and primitives; no code is run."""
    try:
        if str(source).startswith("https://"):
            return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(source) and (part := zipfile.ZipFile(source).testzip()):
            raise ValueError(f"damaged in {part}")  # a checksum, which torch.load does not look at
        return dict(torch.load(source, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{source} was not read or downloaded; use another: {str(error)[:99]}")

def resample(positions, grid):
    """Positions [1,1+n²,C] of a square grid -> [1,1+N,C] of another grid (rows, columns)."""
    same = positions.shape[1] == 1 + math.prod(grid)
    return positions if same else resample_abs_pos_embed(positions, list(grid), antialias=False)

def load_encoder(network, source):
    """Load an encoder (ours, timm's, DINO's, MAE's, the official release's) into a ViT, strictly ->
    the names left aside (ASIDE: heads, decoders). Raises with the first keys that differ."""
    state, aside = read_weights(source), []
    for key in ("teacher", "student", "model", "state_dict"):
        if isinstance(state.get(key), dict):
            aside += [name for name in state if name != key]
            state = state[key]
    for prefix in ("module.", "_orig_mod.", "model.", "backbone."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    aside += [key for key in state if key.startswith(ASIDE)]
    try:
        state["pos_embed"] = resample(state["pos_embed"], network.grid)
        network.load_state_dict({key: state[key] for key in state if key not in aside})
    except Exception as error:
        raise ValueError(f"{source} does not fit the encoder: {str(error)[:500]}")
    return aside

# --- 3.1 Model structure: the frozen teacher ----------------------------------------------------
def cls_attention(x, attn):
    """Input [B,1+N,E] of self-attention -> its attention [B,N], fp32, of [CLS], mean over heads."""
    packed = (attn.qkv.weight, attn.qkv.bias) if hasattr(attn, "qkv") else (
        attn.in_proj_weight, attn.in_proj_bias)
    (w_q, w_k, _), (b_q, b_k, _) = (weight.chunk(3) for weight in packed)  # both pack q, k, v
    q = rearrange(F.linear(x[:, 0], w_q, b_q), "b (h d) -> b h d", h=attn.num_heads)
    k = rearrange(F.linear(x, w_k, b_k), "b n (h d) -> b n h d", h=attn.num_heads)
    # a = mean_h softmax(q_cls·k/√d): a row for each head, never the N×N map
    logits = einsum(q.float(), k.float(), "b h d, b n h d -> b h n") / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1)[:, :, 1:].mean(dim=1)

class Teacher(nn.Module):
    """A network on images normalised by mean_std (0, 1: by itself), frozen for good. Hooks on its
    blocks, registered before any compile, collect the last K, `levels`, and the last attention."""
    def __init__(self, network, levels, mean_std=((0, 0, 0), (1, 1, 1))):
        super().__init__()
        self.network, self.mean_std, self.levels = network, mean_std, levels
        self.image_size, self.grid, self.dim = network.image_size, network.grid, network.dim
        self.depth, self.outputs, self.attention = len(network.blocks), [], []
        if not 1 <= levels <= self.depth:
            raise ValueError(f"levels must be 1 to the teacher's depth {self.depth}, not {levels}")
        for block in network.blocks[-levels:]:
            block.register_forward_hook(lambda block, args, output: self.outputs.append(output))
        network.blocks[-1].attn.register_forward_pre_hook(
            lambda attn, args: self.attention.append(cls_attention(args[0], attn)))
        self.requires_grad_(False).train()
    def train(self, mode=True):
        return super().train(False)
    @torch.no_grad()
    def forward(self, images):
        """Images [B,3,H,W], resized -> K raw block outputs [B,1+N,E], last attention [B,N]."""
        images = normalise(images, *self.mean_std)
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", align_corners=False)
        self.network(images.to(next(self.network.parameters()).dtype))
        levels, attention, self.outputs, self.attention = self.outputs, self.attention, [], []
        return levels[-self.levels:], attention[-1]  # a call that failed may have left some

def load_teacher(name, weights=None, levels=5):
    """A name in VITS or open_clip's -> Teacher of the last levels. weights: open_clip's tag, dino,
    a file, or None for random values. Raises, saying what would do."""
    if weights is None:
        warnings.warn(f"teacher {name} has random weights: fit for tests and timing only")
    if name in VITS:
        network = vit(name)
        if weights is not None:
            load_encoder(network, DINO if weights == "dino" else weights)
        return Teacher(network, levels)
    import open_clip  # takes seconds
    # open_clip only warns if tag and model disagree about QuickGELU, and features are wrong
    entry = open_clip.get_pretrained_cfg(name, weights or "")
    if entry and entry.get("quick_gelu") != open_clip.get_model_config(name).get("quick_gelu"):
        raise ValueError(f"{weights!r} and {name} differ in QuickGELU: add or drop -quickgelu")
    try:
        network = open_clip.create_model(name, pretrained=weights).visual
        network.blocks, network.grid = network.transformer.resblocks, network.grid_size
    except Exception as error:
        raise ValueError(f"teacher {name} is no known ViT with a [CLS] token, or {weights} was not "
                         f"read or downloaded; pass a FILE: {str(error)[:500]}")
    if network.patch_size[0] == 14:  # as 16 of the student's: 224 -> 196 pixels, 16x16 -> 14x14
        network.image_size = tuple(side * 14 // 16 for side in network.image_size)
        network.grid = tuple(side // 14 for side in network.image_size)
        positions = resample(network.positional_embedding.data[None], network.grid)
        network.positional_embedding = nn.Parameter(positions[0])
    network.dim = network.positional_embedding.shape[-1]
    return Teacher(network, levels, (network.preprocess_cfg["mean"], network.preprocess_cfg["std"]))

# --- 3.2 Masking strategy -----------------------------------------------------------------------
def visible(patches, ratio):
    """V = ⌊N(1−r)⌋ in exact arithmetic. Raises unless 0 <= r < 1 and V >= 1."""
    if not 0 <= ratio < 1 or (count := int(patches * (1 - Fraction(str(ratio))))) < 1:
        raise ValueError(f"mask ratio {ratio} leaves no visible patch of {patches}")
    return count

def attentive_keep(attention, ratio, noise=None):
    """Attention [B,N] -> keep [B,V], drawn without replacement, in proportion to attention."""
    noise = torch.rand(attention.shape, device=attention.device) if noise is None else noise
    # Deviation: Gumbel top-k: multinomial's distribution, no wait for the GPU, zeros are allowed.
    # keep = top-V of log a_n + g_n, g_n = −log(−log u_n)
    score = attention.float().log() - torch.log(-torch.log(noise.clamp(min=1e-20)))
    return score.topk(visible(attention.shape[1], ratio), dim=1).indices

def random_keep(batch, patches, ratio, device=None, noise=None):
    """B, N -> keep [B,V], uniform without replacement: attention that is everywhere the same."""
    return attentive_keep(torch.ones(batch, patches, device=device), ratio, noise)

# --- 3.3 Dynamic alignment ----------------------------------------------------------------------
def whiten(y):
    """Teacher features [...,E] -> [...,E] of mean 0 and variance 1: LayerNorm without affine."""
    return F.layer_norm(y.to(torch.promote_types(y.dtype, torch.float32)), y.shape[-1:], eps=1e-5)

def align_loss(pred, target):
    """Prediction and whitened target, both [...,E] -> scalar, fp32 or finer."""
    # L(ŷ,ȳ) = ½(ŷ−ȳ)² if |ŷ−ȳ| <= 1 else |ŷ−ȳ|−½, mean over tokens and channels
    return F.smooth_l1_loss(pred.to(torch.promote_types(pred.dtype, torch.float32)), target)

class DynamicAlignment(nn.Module):
    """Mixes the S student levels for each of K teacher levels by the Dynamic Alignment matrix W,
    `matrix` [K,S], and maps width D to E. Deviation: only the K rows and adaptors that the loss
    reaches exist; each row's 1 starts at evenly matched depth (identity at equal depths)."""
    def __init__(self, student_depth, student_dim, teacher_depth, teacher_dim, levels):
        super().__init__()
        last = range(teacher_depth - levels + 1, teacher_depth + 1)  # levels count from 1
        match = torch.tensor([math.ceil(t * student_depth / teacher_depth) - 1 for t in last])
        self.matrix = nn.Parameter(F.one_hot(match, student_depth) + 0.01)
        self.adaptors = nn.ModuleList(nn.Linear(student_dim, teacher_dim) for _ in last)
        self.apply(initialise)
    def forward(self, features):
        """List of S tensors [B,1+V,D] -> list of K tensors [B,1+V,E]."""
        # ŷ_k = A_k( Σ_s W_ks x_s )
        with torch.autocast(self.matrix.device.type, enabled=False):  # bf16 rounds 1.01 to 1.0078
            mixed = einsum(self.matrix, torch.stack(features), "k s, s b v d -> k b v d")
        return [adaptor(x) for adaptor, x in zip(self.adaptors, mixed)]

class MaskAlign(nn.Module):
    """All that is trained: a student ViT and its alignment to a Teacher, which is not owned. mask:
    "attentive" or "random". Raises if patch grids differ or no patch is left visible."""
    def __init__(self, student, teacher, mask="attentive", mask_ratio=0.7):
        super().__init__()
        if student.grid != teacher.grid:
            raise ValueError(f"patch grids differ: student {student.grid}, teacher {teacher.grid}")
        visible(math.prod(student.grid), mask_ratio)  # raises
        self.student, self.mask, self.mask_ratio = student, mask, mask_ratio
        self.align = DynamicAlignment(len(student.blocks), student.dim,
                                      teacher.depth, teacher.dim, teacher.levels)
    def forward(self, images, levels, attention, keep=None, noise=None):
        """Images [B,3,H,W], the Teacher's K levels [B,1+N,E] and attention [B,N] of them ->
        scalar loss. keep [B,V] overrides the mask; noise [B,N+2S] serves mask and drop path."""
        noise = (None, None) if noise is None else noise.tensor_split([attention.shape[1]], dim=1)
        if keep is None:                                                         # 3.2: [B,V]
            saliency = attention if self.mask == "attentive" else torch.ones_like(attention)
            keep = attentive_keep(saliency, self.mask_ratio, noise[0])
        features = self.student(images, keep, noise[1])                  # 3.1: S times [B,1+V,D]
        predictions = self.align(features)                               # 3.3: K times [B,1+V,E]
        targets = [whiten(take(level, keep)) for level in levels]        #      K times [B,1+V,E]
        # L = 1/K Σ_k L(ŷ_k,ȳ_k)
        return torch.stack([align_loss(p, t) for p, t in zip(predictions, targets)]).mean()
