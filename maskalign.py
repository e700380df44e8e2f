"""MaskAlign: masked image modelling by alignment, without reconstruction.
Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", CVPR 2023, arXiv
2211.08887, in its order: 3.1 model, 3.2 masking, 3.3 alignment. MaskAlign.forward, the last
function, is the paper's figure, a line for each step.

Symbols   B batch   N patches   V visible patches   D student width   E teacher width   C either
          S student depth       K aligned teacher levels, the last K of the teacher's blocks
          P tokens before the patches: [CLS], registers, or none      H heads of width d
Images    RGB [B,3,H,W], uint8 or float in [0,1]; each network normalises for itself.
Tokens    [CLS] comes first: [B,1+N,C] for whole images, [B,1+V,C] for visible patches.
Masks     are indices `keep` [B,V] of the VISIBLE patches.
Noise     is uniform in [0,1), and drawn where it is not given.
`Deviation:` marks departures from paper and official code. An error of use is a UsageError.
"""
import argparse
import difflib
import logging
import math
import pathlib
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from fractions import Fraction

import numpy
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from timm import layers
from timm.models import eva, vision_transformer
from torch import nn

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VITS = {  # timm's names; the last is for the built-in digits
    "vit_tiny_patch16_224": dict(image_size=224, patch_size=16, dim=192, depth=12, heads=3),
    "vit_small_patch16_224": dict(image_size=224, patch_size=16, dim=384, depth=12, heads=6),
    "vit_base_patch16_224": dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12),
    "vit_large_patch16_224": dict(image_size=224, patch_size=16, dim=1024, depth=24, heads=16),
    "vit_digits_patch4_32": dict(image_size=32, patch_size=4, dim=64, depth=4, heads=4),
}


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why, and what would do."""


# --- 3.1 Model structure: the student -----------------------------------------------------------

def to_float(images):
    """Images [B,3,H,W], uint8 or float -> float in [0,1]. Raises if floats are far above 1; checked
    on a CPU and in eager mode only, for it would make a GPU wait and break a trace."""
    if images.dtype == torch.uint8:
        return images / 255
    eager = not torch.compiler.is_compiling()
    if eager and images.device.type == "cpu" and (images > 10).any():
        raise UsageError("images must be uint8, or float in [0, 1] and not in [0, 255]")
    return images


def normalise(images, mean, std):
    """Images [B,3,H,W], uint8 or float in [0,1] -> float, less mean and over std by channel."""
    images = to_float(images)
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


def pixels(grid, patch_size):
    """(rows, columns) of patches and their size -> (height, width) of the image; None for None."""
    return grid and tuple(n * side for n, side in zip(grid, layers.to_2tuple(patch_size)))


def sincos_2d(dim, grid):
    """Width and (rows, columns) of the patch grid, or an int for a square -> fixed positions
    [1+N,dim] (3.1, as MAE's): sines, then cosines, of the column in the first half of the channels,
    of the row in the second; zeros for [CLS]."""
    # ω_i = 10000^(−i/(dim/4)); patch n is in row ⌊n/columns⌋ and column n mod columns
    omega = 10000 ** (-torch.arange(dim // 4).double() / (dim // 4))
    rows, columns = layers.to_2tuple(grid)
    n = torch.arange(rows * columns)
    x = torch.outer(n % columns, omega)
    y = torch.outer(n // columns, omega)
    return F.pad(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1), (0, 0, 1, 0)).float()


def take(tokens, keep):
    """Tokens [B,1+N,C], keep [B,V] -> [B,1+V,C]: [CLS] and the kept patches, in keep's order."""
    rows = F.pad(keep + 1, (1, 0))  # row 0 is [CLS], row 1+i patch i
    return tokens.take_along_dim(rearrange(rows, "b v -> b v 1"), dim=1)


def add_branch(x, branch, drop_rate, noise=None):
    """x and a residual branch [B,N,D] -> their sum. With noise [B], drop path: an image's branch
    is left out with chance p = drop_rate, and multiplied by 1/(1−p) otherwise."""
    if noise is None:
        return x + branch
    # x + branch · [u >= p]/(1−p)
    gate = (noise >= drop_rate).to(x.dtype) / (1 - drop_rate)
    return torch.addcmul(x, rearrange(gate, "b -> b 1 1"), branch)


class Attention(nn.Module):
    """Multi-head self-attention, [B,N,D] -> [B,N,D]. Its q_norm and k_norm, which timm's has too,
    do nothing; there a Teacher's hooks see q and k."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        heads = "b n (qkv h d) -> qkv b h n d"
        q, k, v = rearrange(self.qkv(x), heads, qkv=3, h=self.num_heads)
        # softmax(q·kᵀ/√d)·v
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Pre-norm Transformer block, [B,N,D] -> [B,N,D]; each branch's noise [B] is its drop path's,
    None drops nothing."""

    def __init__(self, dim, heads, drop_rate):
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, attn_noise=None, mlp_noise=None):
        x = add_branch(x, self.attn(self.norm1(x)), self.drop_rate, attn_noise)
        return add_branch(x, self.mlp(self.norm2(x)), self.drop_rate, mlp_noise)


class ViT(nn.Module):
    """A plain Vision Transformer (3.1) under timm's parameter names. image_size: pixels, an int or
    (height, width); drop_path: the last block's drop rate, linear from 0 at the first. Raises if
    patches do not tile the image, or heads or 4 do not divide the width."""

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0):
        super().__init__()
        self.image_size = tuple(layers.to_2tuple(image_size))
        self.grid = tuple(side // patch_size for side in self.image_size)
        if self.image_size != pixels(self.grid, patch_size) or dim % heads or dim % 4:
            raise UsageError(f"patches of {patch_size} must tile the image {self.image_size}, "
                             f"{heads} heads and 4 must divide the width {dim}")
        self.dim = dim
        # a linear map of each patch's pixels
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.drop_rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in self.drop_rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6).requires_grad_(False)  # never called: timm's keys
        self.apply(initialise)

    def forward(self, images, keep=None, path_noise=None):
        """Images [B,3,H,W], keep [B,V] or None for all patches, drop path's noise [B,2S] -> list
        of S tensors [B,1+V,D]: every block's output, without a final norm."""
        images = normalise(images, *IMAGENET_MEAN_STD).to(self.cls_token.dtype)
        patches = rearrange(self.patch_embed["proj"](images), "b d h w -> b (h w) d")
        cls = self.cls_token.expand(images.shape[0], -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed
        if keep is not None:  # before the first block: a dropped patch costs nothing there
            x = take(x, keep)
        noise = [None] * 2 * len(self.blocks)  # a block has two branches
        if self.training and any(self.drop_rates):
            if path_noise is None:
                path_noise = torch.rand(len(x), len(noise), device=x.device)
            noise = path_noise.unbind(1)
        levels = []
        for block, attn_noise, mlp_noise in zip(self.blocks, noise[::2], noise[1::2]):
            x = block(x, attn_noise, mlp_noise)
            levels.append(x)
        return levels


def initialise(module):
    """A layer's initial values, as in the official code: Xavier-uniform weights, zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def vit(name, **overrides):
    """A ViT of a size in VITS; a keyword overrides what it names, unless it is None. Raises for an
    unknown name, and as ViT does."""
    if name not in VITS:
        raise UsageError(f"unknown ViT {name!r}; there are {', '.join(VITS)}")
    return ViT(**VITS[name] | {key: x for key, x in overrides.items() if x is not None})


# --- 3.1 Model structure: weights from files ----------------------------------------------------

WRAPPERS = ("teacher", "student", "model", "state_dict", "module", "encoder", "backbone")
PREFIXES = r"^((module|_orig_mod|model|encoder|backbone|student)\.)+"
ASIDE = ("head", "fc_norm", "decoder", "mask_token", "distill_", "clip_model", "dino_model")
SCALAR = numpy.float64(0).__reduce__()[0]  # the function that reads numpy's scalars
SAFE = [  # what checkpoints hold beside weights; the second of a pair is the name in the file
    argparse.Namespace, numpy.dtype, (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
    *[kind for kind in vars(numpy.dtypes).values() if isinstance(kind, type)],
]


def read_weights(source):
    """A file of torch or safetensors -> dict of its tensors and primitives; no code in it is run.
    Raises if the file is missing or damaged, or holds what could run code."""
    try:
        if str(source).endswith(".safetensors"):
            return safetensors.torch.load_file(source)
        if zipfile.is_zipfile(source):
            archive = zipfile.ZipFile(source)
            if damaged := archive.testzip():  # checksums, which torch.load ignores
                raise UsageError(f"damaged in {damaged}")
            if "/code/" in str(archive.namelist()):
                raise UsageError("TorchScript: torch.save(torch.jit.load(FILE).state_dict(), ...)")
        with torch.serialization.safe_globals(SAFE):
            return dict(torch.load(source, map_location="cpu", weights_only=True))
    except Exception as error:  # a file can be wrong in nearly any way
        # torch's advice, to trust the file, comes first
        reason = (str(error) or repr(error)).rpartition("WeightsUnpickler error: ")[2]
        raise UsageError(f"{source} was not read: {' '.join(reason.split())}") from error


def load_encoder(network, source):
    """Load an encoder from a file (this project's, timm's, DINO's, MAE's, the official release's)
    into a ViT of ours or timm, strictly -> sorted names that were left aside: heads, decoders, what
    lies beside the encoder. Positions of a square grid are resampled to the network's. Raises with
    the first names that differ."""
    state, aside = read_weights(source), set()
    while inner := [key for key in WRAPPERS if isinstance(state.get(key), dict)]:
        aside |= state.keys() - inner[:1]
        state = state[inner[0]]
    state = {re.sub(PREFIXES, "", str(key)): x for key, x in state.items() if torch.is_tensor(x)}
    # levels need no final norm, but SigLIP's pooling query reads its output
    spare = ASIDE if getattr(network, "attn_pool", None) else (*ASIDE, "norm.")
    own = network.state_dict()
    try:
        if not isinstance(network, ViT):
            # timm knows the names that its networks have elsewhere, and resamples
            state = sys.modules[type(network).__module__].checkpoint_filter_fn(state, network)
        elif "pos_embed" in state:
            count = state["pos_embed"].shape[1] - 1
            if math.isqrt(count) ** 2 == count != math.prod(network.grid):
                state["pos_embed"] = layers.resample_abs_pos_embed(
                    state["pos_embed"], network.grid, antialias=False)
        used = {key: x for key, x in state.items() if key in own or not key.startswith(spare)}
        may_lack = {key: x for key, x in own.items() if key.startswith(spare)}
        network.load_state_dict(may_lack | used)
    except Exception as error:  # torch's, a line for each kind of difference, or any of timm's
        lines = [line.strip()[:200] for line in str(error).splitlines()[:9]]
        raise UsageError(f"{source} does not fit the encoder: {' '.join(lines)}") from error
    return sorted(map(str, aside | (state.keys() - used)))


# --- 3.1 Model structure: the frozen teacher ----------------------------------------------------

TIMMS = (vision_transformer.VisionTransformer, eva.Eva)
PLAIN = (layers.Attention, layers.AttentionRope, eva.EvaAttention)


def salient_attention(network):
    """A ViT of ours, open_clip or timm -> its attention that says which patches are salient (3.2):
    the last block's, where [CLS] asks, or, where there is no [CLS], that of the pooling query.
    Raises if there is none, or none that can be read."""
    if isinstance(network, ViT):
        return network.blocks[-1].attn
    if hasattr(network, "class_embedding"):  # open_clip's
        return network.transformer.resblocks[-1].attn
    patches = getattr(network, "patch_embed", None)
    if not isinstance(network, TIMMS) or not isinstance(patches, layers.PatchEmbed):
        raise UsageError(f"a {type(network).__name__} cannot teach: it is no plain ViT")
    if network.cls_token is not None:
        attention = getattr(network.blocks[-1], "attn", None)
        if not isinstance(attention, PLAIN) or getattr(attention, "num_kv_groups", 1) > 1:
            raise UsageError("this ViT cannot teach: its attention is no plain softmax(q·k)")
        return attention
    if not isinstance(network.attn_pool, layers.AttentionPoolLatent):
        raise UsageError("this ViT cannot teach: it has no [CLS] and no pooling query")
    return network.attn_pool


class Teacher(nn.Module):
    """A ViT of ours, open_clip or timm that sees the intact image, frozen for good (3.1). Hooks,
    registered before any compile, see the outputs of the last K blocks, `levels`, and the queries q
    and keys k of the salient_attention. Raises as that does, or if levels exceed the depth."""

    def __init__(self, network, levels=5):
        super().__init__()
        attention = salient_attention(network)  # raises
        self.network, self.levels, self.mean_std = network, levels, None
        if isinstance(network, ViT):  # which normalises for itself
            blocks, patches = network.blocks, network.patch_embed["proj"]
            self.image_size, self.grid = network.image_size, network.grid
        elif hasattr(network, "class_embedding"):  # open_clip's
            blocks, patches = network.transformer.resblocks, network.conv1
            self.image_size, self.grid = network.image_size, network.grid_size
            self.mean_std = network.preprocess_cfg["mean"], network.preprocess_cfg["std"]
        else:  # timm's
            blocks, embed = network.blocks, network.patch_embed
            patches = embed.proj
            self.image_size, self.grid = embed.img_size, embed.grid_size
            colours = timm.data.resolve_model_data_config(network)
            self.mean_std = colours["mean"], colours["std"]
        self.depth, self.dim = len(blocks), patches.out_channels
        self.patches = math.prod(self.grid)
        self.has_cls = attention is not getattr(network, "attn_pool", None)
        # filled by hooks: bound methods, which deepcopy rebinds
        self.outputs, self.q, self.k = [], None, None
        if not 1 <= levels <= self.depth:
            raise UsageError(f"levels must be 1 to the teacher's depth {self.depth}: {levels}")
        for block in blocks[-levels:]:
            block.register_forward_hook(self.see_level)
        if hasattr(attention, "k_norm"):  # ours and timm's
            attention.q_norm.register_forward_hook(self.see_queries)
            attention.k_norm.register_forward_hook(self.see_keys)
            attention.register_forward_hook(self.turn_keys, with_kwargs=True)
        else:
            attention.register_forward_pre_hook(self.see_input)
        self.requires_grad_(False).train()

    def see_level(self, block, args, output):
        """A block's output [B,P+N,E] -> [B,1+N,E]: [CLS], or the mean patch where there is none,
        then the patches; registers and the like are dropped."""
        patches = output[:, -self.patches:]
        first = output[:, :1] if self.has_cls else patches.mean(dim=1, keepdim=True)
        self.outputs.append(torch.cat([first, patches], dim=1))

    def see_queries(self, q_norm, args, q):
        """Ours and timm's: queries [B,H,P+N,d] by head pass q_norm, be it the identity."""
        self.q = q

    def see_keys(self, k_norm, args, k):
        """Ours and timm's: keys [B,H,P+N,d] by head pass k_norm, be it the identity."""
        self.k = k

    def turn_keys(self, attention, args, kwargs, output):
        """timm's: rotary positions, where it has them, have turned the patches' keys since."""
        if kwargs.get("rope") is not None:
            others, k = self.k.tensor_split([-self.patches], dim=2)
            k = layers.apply_rot_embed_cat(k, kwargs["rope"], half=attention.rotate_half)
            self.k = torch.cat([others, k], dim=2)

    def see_input(self, attention, args):
        """open_clip's: q of [CLS] and all k, by its input [B,1+N,E] and packed weights."""
        w_q, w_k, _ = attention.in_proj_weight.chunk(3)
        b_q, b_k, _ = attention.in_proj_bias.chunk(3)
        heads = "b n (h d) -> b h n d"
        q, k = F.linear(args[0][:, :1], w_q, b_q), F.linear(args[0], w_k, b_k)
        self.q, self.k = (rearrange(x, heads, h=attention.num_heads) for x in (q, k))

    def train(self, mode=True):
        """Stays in evaluation mode, whatever the mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        """Images [B,3,H,W], resized to image_size -> list of K raw block outputs [B,1+N,E], [CLS]
        or the mean patch first, and the attention [B,N] of [CLS] or the pooling query, fp32."""
        images = normalise(images, *self.mean_std) if self.mean_std else to_float(images)
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", align_corners=False)
        self.network(images.to(next(self.network.parameters()).dtype))
        # a = mean_h softmax(q·k/√d): the row of [CLS] for each head, never the N×N map
        q, k = self.q[:, :, 0].float(), self.k.float()
        logits = einsum(q, k, "b h d, b h n d -> b h n") / math.sqrt(q.shape[-1])
        levels = self.outputs[-self.levels:]  # a call that failed may have left some
        self.outputs, self.q, self.k = [], None, None
        return levels, logits.softmax(dim=-1)[:, :, -self.patches:].mean(dim=1)


def clip_network(name, weights, grid):
    """load_teacher's arguments -> an image tower of open_clip."""
    import open_clip  # takes seconds
    config = open_clip.get_model_config(name)
    if config is None:
        names = [*VITS, *open_clip.list_models(), *timm.list_models(), *timm.list_pretrained()]
        near = ", ".join(difflib.get_close_matches(name, names)) or "none"
        raise UsageError(f"no teacher is called {name}, or none is published; near it are {near}")
    patch_size = config["vision_cfg"].get("patch_size")  # none: a ResNet, or a network of timm's
    if not patch_size:
        raise UsageError(f"{name} cannot teach: open_clip has no ViT of its own for it")
    tag = "openai" if weights == "pretrained" else weights
    # open_clip only warns if tag and model disagree about QuickGELU, and features are wrong
    entry = open_clip.get_pretrained_cfg(name, tag or "")
    if entry and entry.get("quick_gelu", False) != config.get("quick_gelu", False):
        raise UsageError(f"{tag!r} and {name} differ in QuickGELU: add or drop -quickgelu")
    if tag is not None and not entry:
        read_weights(tag)  # raises; open_clip reads it again, without these checks
    # Deviation: for a grid that is not the model's own, open_clip (and timm, for its models)
    # resamples positions with antialiasing.
    size = pixels(grid, patch_size)
    with torch.serialization.safe_globals(SAFE):
        return open_clip.create_model(name, pretrained=tag, force_image_size=size).visual


def timm_network(name, weights, grid):
    """load_teacher's arguments -> a ViT of timm."""
    network = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
    salient_attention(network)  # raises
    notes = str(network.pretrained_cfg.get("notes"))
    if weights and "QuickGELU" in notes and "quickgelu" not in name:
        raise UsageError(f"{name} was trained with QuickGELU: ask for its clip_quickgelu_ name")
    if weights not in (None, "pretrained"):
        load_encoder(network, weights)
    network.set_input_size(pixels(grid, network.patch_embed.patch_size))
    return network


def load_teacher(name, weights=None, levels=5, grid=None):
    """A name in VITS, timm's or open_clip's -> Teacher of the last K `levels`. weights: a tag of
    open_clip; "pretrained", as published (timm's own; "openai" for an open_clip name); a file; or
    None for random values. grid: the (rows, columns) of patches in which the image is to be seen,
    the student's; None: the network's own. Raises, saying what would do."""
    if weights is None:
        warnings.warn(f"teacher {name} has random weights: fit for tests and timing only")
    if name in VITS and weights != "pretrained":
        network = vit(name, image_size=pixels(grid, VITS[name]["patch_size"]))
        if weights is not None:
            load_encoder(network, weights)
        return Teacher(network, levels)
    logging.disable(logging.ERROR)  # what the libraries log, their exceptions say
    try:
        of_timm = ":" in name or name in timm.list_models() + timm.list_pretrained()
        create = timm_network if of_timm else clip_network  # hf-hub:USER/NAME is timm's
        return Teacher(create(name, weights, grid), levels)
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"teacher {name} was not made or downloaded; --teacher-weights FILE "
                         f"needs no download: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


# --- 3.2 Masking strategy -----------------------------------------------------------------------

def visible(patches, ratio):
    """V = ⌊N(1−r)⌋ in exact arithmetic. Raises unless 0 <= r < 1 and V >= 1."""
    share = 1 - Fraction(str(ratio) if 0 <= ratio < 1 else 1)  # of 0.7, not the float beside it
    count = patches * share.numerator // share.denominator
    if count < 1:
        raise UsageError(f"mask ratio {ratio} leaves no visible patch of {patches}")
    return count


def attentive_keep(attention, ratio, noise=None):
    """Attention [B,N], optional noise [B,N] -> keep [B,V], drawn without replacement, in proportion
    to attention (3.2); a patch without attention is kept once the others run out. Raises as
    `visible` does."""
    if noise is None:
        noise = torch.rand(attention.shape, device=attention.device)
    # Deviation: Gumbel top-k: multinomial's distribution, no wait for the GPU, zeros are allowed.
    # keep = top-V of log a_n + g_n, g_n = −log(−log u_n)
    gumbel = -torch.log(-torch.log(noise.clamp(min=1e-20)))
    score = attention.float().log() + gumbel
    return score.topk(visible(attention.shape[1], ratio)).indices


def random_keep(batch, patches, ratio, device=None, noise=None):
    """B, N, optional noise [B,N] -> keep [B,V], uniform without replacement (3.2): attention that
    is everywhere the same. Raises as `visible` does."""
    return attentive_keep(torch.ones(batch, patches, device=device), ratio, noise)


# --- 3.3 Dynamic alignment ----------------------------------------------------------------------

def whiten(y):
    """Teacher features [...,E] -> [...,E] of mean 0 and variance 1 (3.3): LayerNorm without affine,
    in fp32 or finer."""
    return F.layer_norm(y.to(torch.promote_types(y.dtype, torch.float32)), y.shape[-1:], eps=1e-5)


def align_loss(pred, target):
    """Prediction and whitened target, both [...,E] -> scalar, fp32 or finer (3.3)."""
    # L(ŷ,ȳ) = ½(ŷ−ȳ)² if |ŷ−ȳ| <= 1 else |ŷ−ȳ|−½, mean over tokens and channels
    return F.smooth_l1_loss(pred.to(torch.promote_types(pred.dtype, torch.float32)), target)


class DynamicAlignment(nn.Module):
    """Mixes the S student levels for each of K teacher levels by the Dynamic Alignment matrix W,
    `matrix` [K,S], and maps width D to E by K linear `adaptors` (3.3). Deviation: only the K rows
    and adaptors that the loss reaches exist; each row's 1 starts at evenly matched depth (identity
    at equal depths)."""

    def __init__(self, student_depth, student_dim, teacher_depth, teacher_dim, levels):
        super().__init__()
        # level t of the teacher's T, counted from 1, starts at level ⌈t·S/T⌉ of the student
        t = torch.arange(teacher_depth - levels + 1, teacher_depth + 1)
        match = (t * student_depth - 1) // teacher_depth
        self.matrix = nn.Parameter(F.one_hot(match, student_depth) + 0.01)
        self.adaptors = nn.ModuleList(nn.Linear(student_dim, teacher_dim) for _ in t)
        self.apply(initialise)

    def forward(self, features):
        """List of S tensors [B,1+V,D] -> list of K tensors [B,1+V,E]."""
        # ŷ_k = A_k( Σ_s W_ks x_s )
        # not in bf16, which rounds 1.01 to 1.0078
        with torch.autocast(self.matrix.device.type, enabled=False):
            mixed = einsum(self.matrix, torch.stack(features), "k s, s b v d -> k b v d")
        return [adaptor(x) for adaptor, x in zip(self.adaptors, mixed)]


class MaskAlign(nn.Module):
    """All that is trained: a student ViT and its alignment to a Teacher, which is not owned. mask:
    "attentive" or "random". Raises for another mask, if patch grids differ, or if no patch is left
    visible."""

    def __init__(self, student, teacher, mask="attentive", mask_ratio=0.7):
        super().__init__()
        if mask not in ("attentive", "random"):
            raise UsageError(f"the mask is attentive or random, not {mask!r}")
        if student.grid != teacher.grid:
            raise UsageError(f"patch grids differ: student {student.grid}, teacher {teacher.grid}")
        visible(math.prod(student.grid), mask_ratio)  # raises
        self.student, self.mask, self.mask_ratio = student, mask, mask_ratio
        self.align = DynamicAlignment(len(student.blocks), student.dim,
                                      teacher.depth, teacher.dim, teacher.levels)

    def forward(self, images, levels, attention, keep=None, mask_noise=None, path_noise=None):
        """Images [B,3,H,W], the Teacher's K levels [B,1+N,E] and attention [B,N] of them ->
        scalar loss. keep [B,V] overrides the mask; mask_noise [B,N] and path_noise [B,2S] are those
        of the mask and of drop path."""
        if keep is None:  # 3.2: [B,V]
            salience = attention if self.mask == "attentive" else torch.ones_like(attention)
            keep = attentive_keep(salience, self.mask_ratio, mask_noise)
        features = self.student(images, keep, path_noise)  # 3.1: S times [B,1+V,D]
        predictions = self.align(features)  # 3.3: K times [B,1+V,E]
        targets = [whiten(take(level, keep)) for level in levels]  # K times [B,1+V,E]
        # L = 1/K Σ_k L(ŷ_k,ȳ_k)
        losses = [align_loss(pred, target) for pred, target in zip(predictions, targets)]
        return torch.stack(losses).mean()
