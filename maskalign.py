"""MaskAlign: masked image modelling by alignment, without reconstruction.
Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", CVPR 2023, arXiv
2211.08887, in its order: 3.1 model, 3.2 masking, 3.3 alignment. MaskAlign.forward is the paper's
figure, one line per step. Below it: weights from files, teachers by name.

Symbols   B batch   N patches   V visible patches   D student width   E teacher width   C any width
          S student depth       K aligned teacher levels, the outputs of its last K blocks
          P tokens before the patches: [CLS], registers, or none      d width of an attention head
Images    RGB [B,3,height,width], uint8 or float in [0,1]; student and Teacher normalise them.
Tokens    [CLS] comes first: [B,1+N,C] for whole images, [B,1+V,C] for visible patches.
Levels    of a teacher are a list of K tensors; `levels` as a setting is K itself.
Masks     are indices `keep` [B,V] of the VISIBLE patches.
Noise     is uniform in [0,1). If it is not given, masking draws it, and so does a ViT in training.
`Deviation:` marks departures from the paper and its official code. User errors raise UsageError.
"""
import functools
import logging
import math
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from fractions import Fraction
from types import SimpleNamespace

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from timm import layers
from timm.models import eva, vision_transformer
from torch import nn

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UsageError(ValueError):
    """A request that cannot be met; the message says why, and what to do instead."""


# --- 3.1 Model structure: the student -----------------------------------------------------------

def can_check(x):
    """Whether values may be looked at: a GPU would have to wait, a compiled graph would break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def to_float(images):
    """Images -> float in [0,1]. Raises UsageError, on a CPU, if floats are in another range."""
    if images.dtype == torch.uint8:
        return images / 255
    # bicubic overshoot is allowed; normalised images usually go below, those up to 255 above
    if can_check(images) and ((images < -0.5) | (images > 10)).any():
        raise UsageError("images must be uint8, or float in [0, 1] and not normalised")
    return images


def normalise(images, mean, std):
    """Images [...,3,height,width], uint8 or float -> float, (x − mean)/std by channel."""
    # mean and std are floats: tensors would have to follow the images to their device
    channels = zip(to_float(images).unbind(-3), mean, std)
    return torch.stack([(x - m) / s for x, m, s in channels], dim=-3)


def sincos_2d(dim, grid):
    """Width and (rows, columns) of the patch grid, or an int for a square -> fixed positions
    [1+N,dim] (3.1, as MAE's): sines, then cosines, of the column in the first half of the channels,
    of the row in the second; zeros for [CLS]."""
    # ω_i = 10000^(−i/(dim/4))
    omega = 10000 ** (-torch.arange(dim // 4).double() / (dim // 4))
    places = torch.cartesian_prod(*map(torch.arange, layers.to_2tuple(grid)))  # [N,2]: row, column
    angles = places.flip(1)[:, :, None] * omega  # [N,2,dim/4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return F.pad(waves, (0, 0, 1, 0)).float()


def pick(rows, keep):
    """Rows [B,N,...], or [1,N,...] for all, keep [B,V] -> [B,V,...]."""
    b = torch.arange(rows.shape[0], device=rows.device)
    return rows[b[:, None], keep]  # take_along_dim would recompile for each batch size


def take(tokens, keep):
    """Tokens [B,1+N,C], keep [B,V] -> [B,1+V,C]: [CLS] and the kept patches, in keep's order."""
    return pick(tokens, F.pad(keep + 1, (1, 0)))  # row 0 is [CLS], row 1+i patch i


class Attention(nn.Module):
    """Multi-head self-attention, [B,N,D] -> [B,N,D]. A Teacher reads q and k at q_norm and k_norm,
    identities with timm's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        heads = "b n (qkv h d) -> qkv b h n d"  # packed as in timm's files
        q, k, v = rearrange(self.qkv(x), heads, qkv=3, h=self.num_heads)
        # softmax(q·kᵀ/√d)·v
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Pre-norm Transformer block, [B,N,D] -> [B,N,D]. The gates of drop path, numbers or [B,1,1],
    multiply its two residual branches."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, gates=(1, 1)):
        x = x + gates[0] * self.attn(self.norm1(x))
        return x + gates[1] * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A plain Vision Transformer (3.1) with timm's parameter names. image_size: an int or (height,
    width); drop_path: the last block's drop rate, rising linearly from 0. Raises UsageError unless
    patches tile the image, and heads and 4 divide dim."""
    pretrained_cfg = dict(mean=(0, 0, 0), std=(1, 1, 1))  # a Teacher passes images as they are

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0):
        super().__init__()
        # used for its sizes and weights: a linear map of a patch's pixels, with timm's names
        embed = self.patch_embed = layers.PatchEmbed(image_size, patch_size, embed_dim=dim)
        self.image_size, self.grid = embed.img_size, embed.grid_size
        if any(side % patch_size for side in self.image_size) or dim % heads or dim % 4:
            raise UsageError(f"patches of {patch_size} must tile {self.image_size} pixels, "
                             f"{heads} heads and 4 must divide the width {dim}")
        self.dim, self.patch_size = dim, patch_size
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.drop_path = drop_path
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6).requires_grad_(False)  # unused: timm's keys
        self.apply(initialise)

    def forward(self, images, keep=None, path_noise=None):
        """Images [B,3,height,width], keep [B,V] or None for all patches, drop path's noise [B,2S]
        -> list of S tensors [B,1+V,D]: every block's output, without a final norm."""
        sizes = dict(row=self.grid[0], column=self.grid[1], p=self.patch_size, q=self.patch_size)
        patches = rearrange(images, "b c (row p) (column q) -> b (row column) c p q", **sizes)
        positions = self.pos_embed
        if keep is not None:  # equals adding positions first, but embeds the kept patches only
            patches, positions = pick(patches, keep), take(positions, keep)
        x = normalise(patches, *IMAGENET_MEAN_STD).to(self.cls_token.dtype)
        proj = self.patch_embed.proj
        x = F.linear(x.flatten(2), proj.weight.flatten(1), proj.bias)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + positions
        depth = len(self.blocks)
        gates = [(1, 1)] * depth
        if self.training and self.drop_path:
            if path_noise is None:
                path_noise = torch.rand(x.shape[0], 2 * depth, device=x.device)
            # gate = [u >= p]/(1−p): a branch is dropped with probability p, rising with depth
            p = torch.linspace(0, self.drop_path, depth, device=x.device).repeat_interleave(2)
            gate = ((path_noise >= p) / (1 - p)).to(x.dtype)
            gates = rearrange(gate, "b (s two) -> s two b 1 1", two=2)  # S pairs of [B,1,1]
        features = []
        for block, pair in zip(self.blocks, gates):
            x = block(x, pair)
            features.append(x)
        return features


def initialise(module):
    """The official code's values: Xavier weights, zero biases, but PyTorch's bias for patches."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


SIDES = dict(image_size=224, patch_size=16)
VITS = {  # timm's names; the last is for the built-in digits
    "vit_tiny_patch16_224": SIDES | dict(dim=192, depth=12, heads=3),
    "vit_small_patch16_224": SIDES | dict(dim=384, depth=12, heads=6),
    "vit_base_patch16_224": SIDES | dict(dim=768, depth=12, heads=12),
    "vit_large_patch16_224": SIDES | dict(dim=1024, depth=24, heads=16),
    "vit_digits_patch4_32": dict(image_size=32, patch_size=4, dim=64, depth=4, heads=4),
}


def vit(name, **overrides):
    """A ViT of a size in VITS; overrides of None are ignored. Raises UsageError for other names."""
    if name not in VITS:
        raise UsageError(f"unknown ViT {name!r}; there are {', '.join(VITS)}")
    return ViT(**VITS[name] | {key: x for key, x in overrides.items() if x is not None})


# --- 3.1 Model structure: the frozen teacher ----------------------------------------------------

PLAIN_VITS = (ViT, vision_transformer.VisionTransformer, eva.Eva)
PLAIN_ATTENTION = (Attention, layers.Attention, layers.AttentionRope, eva.EvaAttention)


def timm_attn(network):
    """A ViT of timm or ours -> the attention module that tells which patches are salient (3.2): the
    last block's, for its [CLS], or, without a [CLS], the pooling query's. Raises UsageError if
    there is none, or none that can be read."""
    embed = getattr(network, "patch_embed", None)
    if not isinstance(network, PLAIN_VITS) or not isinstance(embed, layers.PatchEmbed):
        raise UsageError(f"a {type(network).__name__} cannot teach: it is no plain ViT")
    if network.cls_token is None:
        if not isinstance(network.attn_pool, layers.AttentionPoolLatent):
            raise UsageError("this ViT cannot teach: it has no [CLS] and no pooling query")
        return network.attn_pool
    attn = getattr(network.blocks[-1], "attn", None)
    if not isinstance(attn, PLAIN_ATTENTION) or getattr(attn, "num_kv_groups", 1) > 1:
        raise UsageError("this ViT cannot teach: no plain softmax(q·k) attention")
    return attn


class Teacher(nn.Module):
    """A ViT of ours, open_clip's or timm's, frozen, that sees the intact image (3.1). Hooks,
    registered before any compilation, capture the outputs of the last K blocks and the last
    attention's queries q and keys k. Deviation: without a [CLS], the mean patch takes its place in
    levels, the pooling query in q. Raises UsageError as timm_attn does, or if K is too large."""

    def __init__(self, network, levels=5):
        super().__init__()
        self.network, self.levels = network, levels
        if hasattr(network, "class_embedding"):  # open_clip's
            blocks, proj = network.transformer.resblocks, network.conv1
            self.image_size, self.grid = network.image_size, network.grid_size
            attn, config = blocks[-1].attn, network.preprocess_cfg
        else:
            attn, blocks, embed = timm_attn(network), network.blocks, network.patch_embed
            proj, self.image_size, self.grid = embed.proj, embed.img_size, embed.grid_size
            config = timm.data.resolve_model_data_config(network)
        self.mean_std = config["mean"], config["std"]
        self.count, self.depth, self.dim = math.prod(self.grid), len(blocks), proj.out_channels
        if not 1 <= levels <= self.depth:
            raise UsageError(f"levels must be 1 to the teacher's depth {self.depth}: {levels}")
        self.has_cls = attn is not getattr(network, "attn_pool", None)
        # filled by hooks, bound methods: deepcopy rebinds them, so a copy fills itself
        self.outputs, self.q, self.k = [], None, None
        for block in blocks[-levels:]:
            block.register_forward_hook(self.see_level)
        if hasattr(attn, "k_norm"):  # ours and timm's
            attn.q_norm.register_forward_hook(self.see_queries)
            attn.k_norm.register_forward_hook(self.see_keys)
            attn.register_forward_hook(self.rotate_keys, with_kwargs=True)
        else:
            attn.register_forward_pre_hook(self.see_input)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):
        """Images [B,3,height,width], resized to image_size -> levels, a list of K raw block outputs
        [B,1+N,E], and the attention [B,N] of [CLS] to the patches, fp32."""
        images = normalise(images, *self.mean_std)
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic")
        self.network(images.to(next(self.network.parameters()).dtype))
        # a = mean_h softmax(q·k/√d): the row of [CLS] for each head, never the N×N map
        q, k = self.q[:, :, 0].float(), self.k.float()
        logits = einsum(q, k, "b h d, b h n d -> b h n") / math.sqrt(q.shape[-1])
        levels = self.outputs[-self.levels:]  # a failed call may have left some before
        self.outputs, self.q, self.k = [], None, None
        return levels, logits.softmax(dim=-1)[:, :, -self.count:].mean(dim=1)

    def train(self, mode=True):
        """Always in eval mode."""
        return super().train(False)

    def see_level(self, block, args, output):
        """A block's output [B,P+N,E] -> [B,1+N,E]: [CLS], or the mean patch where there is none,
        then the patches; other tokens, such as registers, are dropped."""
        patches = output[:, -self.count:]
        first = output[:, :1] if self.has_cls else patches.mean(dim=1, keepdim=True)
        self.outputs.append(torch.cat([first, patches], dim=1))

    def see_queries(self, q_norm, args, q):
        """Ours and timm's: q_norm's output, queries [B,heads,P+N,d], or [B,heads,1,d] to pool."""
        self.q = q

    def see_keys(self, k_norm, args, k):
        """Ours and timm's: k_norm's output, keys [B,heads,P+N,d]."""
        self.k = k

    def rotate_keys(self, attn, args, kwargs, output):
        """timm's: rotary position embedding, if any, rotates the patches' keys after k_norm; [CLS],
        whose query is read, is not rotated."""
        if kwargs.get("rope") is not None:
            others, k = self.k.tensor_split([-self.count], dim=2)
            k = layers.apply_rot_embed_cat(k, kwargs["rope"], half=attn.rotate_half)
            self.k = torch.cat([others, k], dim=2)

    def see_input(self, attn, args):
        """open_clip's: q and k from the input [B,1+N,E] and the packed weights of q, k and v."""
        both = 2 * attn.embed_dim
        x = F.linear(args[0], attn.in_proj_weight[:both], attn.in_proj_bias[:both])
        self.q, self.k = rearrange(x, "b n (qk h d) -> qk b h n d", qk=2, h=attn.num_heads)


# --- 3.2 Masking strategy -----------------------------------------------------------------------

def visible_count(patches, ratio):
    """N, r -> V = ⌊N(1−r)⌋. Deviation: in exact arithmetic (N 20, r 0.8: 4; official code: 3).
    Raises UsageError unless 0 <= r < 1 and V >= 1."""
    # as the decimal 0.7, not its nearest float; an invalid ratio counts as 1, which fails below
    share = 1 - Fraction(str(ratio) if 0 <= ratio < 1 else 1)
    count = patches * share.numerator // share.denominator
    if count < 1:
        raise UsageError(f"mask ratio {ratio} is not in [0, 1) or masks all {patches}")
    return count


def attentive_keep(attention, ratio, noise=None):
    """Attention [B,N], optional noise [B,N] -> keep [B,V], sampled without replacement, in
    proportion to attention (3.2); patches of zero attention come last, uniformly. Raises UsageError
    as visible_count does, or, on a CPU, if attention is negative or NaN."""
    if can_check(attention) and not (attention >= 0).all():
        raise UsageError("attention is negative or NaN")
    if noise is None:
        noise = torch.rand(attention.shape, device=attention.device)
    # Deviation: Gumbel top-k: multinomial's distribution, no wait for the GPU, zeros are allowed.
    # keep = top-V of log a_n + g_n, g_n = −log(−log u_n)
    gumbel = -torch.log(-torch.log(noise.clamp(min=1e-20)))  # finite, if u_n is 0
    # log 0 is -200: with any g_n it stays below log a_n + g_n of any a_n > 0 in fp32
    score = attention.float().log().clamp(min=-200) + gumbel
    return score.topk(visible_count(attention.shape[1], ratio)).indices


def random_keep(batch, patches, ratio, device=None, noise=None):
    """B, N, optional noise [B,N] -> keep [B,V], sampled uniformly without replacement (3.2)."""
    return attentive_keep(torch.ones(batch, patches, device=device), ratio, noise)


# --- 3.3 Dynamic alignment ----------------------------------------------------------------------

def whiten(y):
    """Features [...,E] -> mean 0, variance 1 (3.3): LayerNorm without affine, fp32 or finer."""
    return F.layer_norm(y.to(torch.promote_types(y.dtype, torch.float32)), y.shape[-1:], eps=1e-5)


def align_loss(pred, target):
    """Prediction and whitened target, both [...,E] -> scalar of target's dtype (3.3). Deviation: as
    in the paper; the official code doubles it, which does not change Adam's steps."""
    # L(ŷ,ȳ) = ½(ŷ−ȳ)² if |ŷ−ȳ| <= 1 else |ŷ−ȳ|−½, mean over tokens and channels
    return F.smooth_l1_loss(pred.to(target.dtype), target)


class DynamicAlignment(nn.Module):
    """Mixes S student features for each of K teacher levels by the Dynamic Alignment matrix W,
    `matrix` [K,S], and maps D to E by K linear `adaptors` (3.3). Deviation: only rows and adaptors
    that the loss reaches exist; each row's 1 starts at matched depth (equal depths: rows of I)."""

    def __init__(self, student_depth, student_dim, teacher_depth, teacher_dim, levels):
        super().__init__()
        # block t of a teacher of depth T, from 1, is matched to block ⌈t·S/T⌉ of the student
        t = torch.arange(teacher_depth - levels + 1, teacher_depth + 1)
        match = (t * student_depth - 1) // teacher_depth
        self.matrix = nn.Parameter(F.one_hot(match, student_depth) + 0.01)
        self.adaptors = nn.ModuleList(nn.Linear(student_dim, teacher_dim) for _ in t)
        self.apply(initialise)

    def forward(self, features):
        """List of S tensors [B,1+V,D] -> list of K tensors [B,1+V,E]."""
        # ŷ_k = A_k( Σ_s W_ks x_s )
        with torch.autocast(self.matrix.device.type, enabled=False):  # bf16 rounds 1.01 to 1.0078
            mixed = einsum(self.matrix, torch.stack(features), "k s, s b v d -> k b v d")
        return [adaptor(x) for adaptor, x in zip(self.adaptors, mixed)]


class MaskAlign(nn.Module):
    """All that is trained: a student ViT and its alignment to a teacher. mask: "attentive" or
    "random". teacher: a Teacher, or anything with a tuple `grid` (rows, columns), `depth`, `dim` E,
    `levels` K; only these are read: the caller passes levels, attention = teacher(images) to
    forward. Raises UsageError for another mask, if grids differ, or if no patch stays visible."""

    def __init__(self, student, teacher, mask="attentive", mask_ratio=0.7):
        super().__init__()
        if mask not in ("attentive", "random"):
            raise UsageError(f"the mask is attentive or random, not {mask!r}")
        if student.grid != teacher.grid:
            raise UsageError(f"grids differ: student {student.grid}, teacher {teacher.grid}")
        visible_count(math.prod(student.grid), mask_ratio)  # raises here, not in the first step
        self.student, self.mask, self.mask_ratio = student, mask, mask_ratio
        self.align = DynamicAlignment(len(student.blocks), student.dim,
                                      teacher.depth, teacher.dim, teacher.levels)

    def draw(self, attention, noise=None):
        """Attention [B,N], optional noise [B,N] -> keep [B,V], by the kind of mask (3.2)."""
        if self.mask == "random":
            return random_keep(*attention.shape, self.mask_ratio, attention.device, noise)
        return attentive_keep(attention, self.mask_ratio, noise)

    def forward(self, images, levels, attention, keep=None, mask_noise=None, path_noise=None):
        """Images [B,3,height,width], the teacher's K levels [B,1+N,E] and attention [B,N] for them
        -> scalar loss. keep [B,V] overrides the mask of noise [B,N]; path_noise is [B,2S]."""
        # 3.1, by the caller: levels, attention = teacher(images)
        if keep is None:
            keep = self.draw(attention, mask_noise)  # 3.2: [B,V]
        features = self.student(images, keep, path_noise)  # 3.1: S times [B,1+V,D]
        predictions = self.align(features)  # 3.3: K times [B,1+V,E]
        targets = [whiten(take(level.detach(), keep)) for level in levels]  # K times [B,1+V,E]
        # L = 1/K Σ_k L(ŷ_k,ȳ_k)
        losses = [align_loss(*pair) for pair in zip(predictions, targets, strict=True)]
        return torch.stack(losses).mean()


# --- Weights from files, teachers by name -------------------------------------------------------

WRAPPERS = ("teacher", "student", "model", "state_dict", "module", "encoder", "backbone")
# cut from names: wrappers, and CHUNK of DINOv2's blocks.CHUNK.BLOCK
SURPLUS = (r"^((module|_orig_mod|model|base_encoder|encoder|backbone|student)\.)+"
           r"|(?<=\bblocks\.)\d+\.(?=\d)")
# prefixes of names outside the encoder
ASIDE = r"\w*(head|fc_norm|decoder|predictor|mask_token|momentum_|distill_|clip_model|dino_model)"
REBUILD = {"OrderedDict": OrderedDict, "_rebuild_parameter": lambda tensor, *others: tensor,
           "_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2}
FOREIGN = {"embeddings.": " (Hugging Face's names? timm has the same weights by name)",
           "conv_proj.": " (torchvision's names? timm has the same weights by name)"}


def pixels(grid, patch_size):
    """(rows, columns) of patches and their size -> (height, width) of the image; None for None."""
    return grid and tuple(n * side for n, side in zip(grid, layers.to_2tuple(patch_size)))


class Placeholder:
    """Replaces any object in a file but tensors and primitives: accepts any arguments, calls and
    contents, and ignores them."""
    dtype = torch.uint8  # where it stands for a kind of storage: bytes

    def __new__(cls, *args, **options):
        return super().__new__(cls)

    __call__ = __setstate__ = __setitem__ = append = lambda self, *args: self


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors and looks up nothing else: no code runs that a file asks for."""

    def find_class(self, module, name):
        # a new partial each time: a file may set attributes on what it gets
        return functools.partial(REBUILD[name]) if name in REBUILD else Placeholder


# a "pickle_module" for torch.load
READER = SimpleNamespace(__name__="reader", Unpickler=Unpickler,
                         load=lambda file, **options: Unpickler(file, **options).load())


def read_weights(source):
    """A file of torch or safetensors -> dict of its tensors and primitives; other objects become
    Placeholders, no code runs. Raises UsageError if it is missing, damaged, or holds no dict."""
    try:
        if str(source).endswith(".safetensors"):
            return safetensors.torch.load_file(source)
        if zipfile.is_zipfile(source):
            archive = zipfile.ZipFile(source)
            if damaged := archive.testzip():  # checksums, which torch.load ignores
                raise UsageError(f"damaged in {damaged}")
            if "constants.pkl" in str(archive.namelist()):
                raise UsageError("TorchScript: save torch.jit.load(FILE).state_dict()")
        state = torch.load(source, "cpu", pickle_module=READER, weights_only=False)
        if not isinstance(state, dict):
            raise UsageError("no dict of weights: save model.state_dict()")
        return state
    except Exception as error:  # a file can be wrong in nearly any way
        reason = (str(error) or repr(error)).split()
        raise UsageError(f"{source} was not read: {' '.join(reason)}") from error


def fit_positions(positions, grid):
    """A file's positions [1,1+N,D], grid (rows, columns) -> positions of that grid. Their own grid
    is the one whose sin-cos positions they are; or else `grid`, if N agrees; or else a square; if
    none fits, they are returned as they are."""
    cls, x = positions[0].float().tensor_split([1])
    count, side = len(x), math.isqrt(len(x))
    shapes = [(n, count // n) for n in range(1, count + 1) if count % n == 0]
    told = [s for s in shapes if F.mse_loss(x, sincos_2d(x.shape[1], s)[1:]) < 0.01]
    own = next((s for s in (*told, grid, (side, side)) if math.prod(s) == count), None)
    if own is None:
        return positions
    x = F.interpolate(rearrange(x, "(r s) d -> 1 d r s", r=own[0]), grid, mode="bicubic")
    return torch.cat([cls, rearrange(x, "1 d r s -> (r s) d")])[None]


def load_encoder(network, source):
    """Load an encoder from a file (this project's, timm's, DINO's, DINOv2's, MAE's, MoCo v3's, the
    official release's, open_clip's) into a ViT of its library or ours, strictly, its positions
    resampled to the grid -> sorted names left aside: heads, decoders, what lies beside the encoder.
    Raises UsageError with the file's names and the first that differ."""
    state, aside = read_weights(source), set()
    while wrapper := next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None):
        aside |= state.keys() - {wrapper}
        state = state[wrapper]
    names = ", ".join(map(str, state))
    state = {re.sub(SURPLUS, "", str(key)): x for key, x in state.items() if torch.is_tensor(x)}
    own = network.state_dict()
    # levels need no final norm, but SigLIP's pooling query reads its output
    optional = ASIDE if getattr(network, "attn_pool", None) else ASIDE + r"|norm\."
    try:
        if hasattr(network, "class_embedding"):  # open_clip's
            import open_clip
            open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=network))
            state = {key[7:]: x for key, x in state.items() if key.startswith("visual.")}
        elif not isinstance(network, ViT):  # timm knows the names of its networks elsewhere
            state = sys.modules[type(network).__module__].checkpoint_filter_fn(state, network)
        elif "pos_embed" in state:
            state["pos_embed"] = fit_positions(state["pos_embed"], network.grid)
        used = {key: x for key, x in state.items() if key in own or not re.match(optional, key)}
        spare = {key: x for key, x in own.items() if re.match(optional, key)}  # kept if absent
        network.load_state_dict(spare | used)
    except (RuntimeError, LookupError, ValueError) as error:  # torch's and timm's
        lines = [line.strip()[:200] for line in str(error).splitlines()[:9]]
        hint = "".join(FOREIGN[part] for part in FOREIGN if part in names)
        raise UsageError(f"{source} does not fit the encoder: it holds {names[:150]}{hint}; "
                         f"{' '.join(lines)}") from error
    return sorted(map(str, aside | (state.keys() - used)))


def clip_network(name, weights, grid):
    """load_teacher's arguments -> an image tower of open_clip."""
    import open_clip  # takes seconds
    config = open_clip.get_model_config(name) or dict(vision_cfg={})
    patch_size = config["vision_cfg"].get("patch_size")  # none: a ResNet, or a timm network
    if not patch_size:
        raise UsageError(f"{name} cannot teach: no plain ViT of open_clip or timm, or unpublished")
    weights = "openai" if weights == "pretrained" else weights
    # open_clip only warns if a tag and a model disagree about QuickGELU, and features are wrong
    published = open_clip.get_pretrained_cfg(name, weights or "")
    if published and published.get("quick_gelu", False) != config.get("quick_gelu", False):
        raise UsageError(f"{weights} and {name} differ in QuickGELU: add or drop -quickgelu")
    # Deviation: for a grid that is not the model's own, open_clip (and timm, for its models)
    # resamples positions with antialiasing.
    tower = open_clip.create_model(name, pretrained=weights if published else None,
                                   force_image_size=pixels(grid, patch_size)).visual
    if weights is not None and not published:
        load_encoder(tower, weights)
    return tower


def timm_network(name, weights, grid):
    """load_teacher's arguments -> a ViT of timm."""
    network = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
    timm_attn(network)  # raises
    notes = str(network.pretrained_cfg.get("notes"))
    if weights and "QuickGELU" in notes and "quickgelu" not in name:
        raise UsageError(f"{name} was trained with QuickGELU: use its clip_quickgelu_ name")
    if weights not in (None, "pretrained"):
        load_encoder(network, weights)
    network.set_input_size(pixels(grid, network.patch_embed.patch_size))
    return network


def load_teacher(name, weights=None, levels=5, grid=None):
    """A name in VITS, timm's or open_clip's -> Teacher of the last K `levels`. weights: a tag of
    open_clip; "pretrained", the published weights ("openai" for open_clip's names); a file; or
    None for random values. grid: the (rows, columns) of patches in which the image is to be seen,
    the student's; None: the network's own. Raises UsageError with a suggestion."""
    if weights is None:
        warnings.warn(f"teacher {name} has random weights: fit for tests and timing only")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the libraries' exceptions repeat what they log
    try:
        of_timm = ":" in name or name in timm.list_models() + timm.list_pretrained()
        if name in VITS and weights != "pretrained":
            network = vit(name, image_size=pixels(grid, VITS[name]["patch_size"]))
            if weights is not None:
                load_encoder(network, weights)
        else:  # hf-hub:USER/NAME is timm's
            network = (timm_network if of_timm else clip_network)(name, weights, grid)
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"teacher {name} was not made or downloaded; --teacher-weights FILE "
                         f"needs no download: {error}") from error
    finally:
        logging.disable(disabled)
    return Teacher(network, levels)
