"""Properties of maskalign.py and train.py; sizes are drawn pairwise distinct."""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tokenize
import warnings
import zlib
from fractions import Fraction
from multiprocessing.reduction import ForkingPickler
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import PIL.JpegImagePlugin
import filelock
import nbformat
import numpy
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image, ImageDraw
from hypothesis import assume, example, given, settings, strategies as st
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                    register_optimizer_step_pre_hook)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import maskalign as ma
import train

HERE = Path(__file__).parent
torch.set_num_threads(1)  # two runs at once are faster than one with two threads
logging.getLogger("torch.__trace").propagate = False  # pytest would write its graphs out

settings.register_profile("fast", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fast")
IMAGENET = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def same(a, b, atol=0, where="result"):
    """Asserts that two trees of tensors and primitives are equal; atol 0: bit for bit, in dtype."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: only one has {a.keys() ^ b.keys()}"
        for key in a:
            same(a[key], b[key], atol, f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} items"
        for i, pair in enumerate(zip(a, b)):
            same(*pair, atol, f"{where}[{i}]")
    elif torch.is_tensor(a) and torch.is_tensor(b):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=not atol,
                                   msg=lambda text: f"{where}: {text}")
    else:
        assert type(a) is type(b) and a == b, f"{where}: {a!r} and {b!r}"


def small_vit(**options):
    """A student of S 3, D 8 and 3x3 patches."""
    return ma.ViT(**{**dict(image_size=12, patch_size=4, dim=8, depth=3, heads=2), **options})


def shaken(network):
    """Random values everywhere, so that no zero or identity hides a fault."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def trainable(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


# --- 3.1 Model structure: the student -----------------------------------------------------------

@given(st.integers(1, 4), st.integers(5, 9), st.integers(10, 13))
def test_sincos_positions_equal_loops(quarter, rows, columns):
    omega = [10000 ** (-i / quarter) for i in range(quarter)]
    patches = [[f(place * w) for place in (column, row) for f in (math.sin, math.cos)
                for w in omega] for row in range(rows) for column in range(columns)]
    loops = torch.tensor([[0.0] * 4 * quarter, *patches])
    same(ma.sincos_2d(4 * quarter, (rows, columns)), loops, atol=1e-6)
    same(ma.sincos_2d(8, 3), ma.sincos_2d(8, (3, 3)))


@given(st.integers(1, 4), st.integers(5, 9), st.integers(10, 13))
def test_take_equals_loops(batch, patches, width):
    tokens = torch.arange(batch * (1 + patches) * width).view(batch, 1 + patches, width)
    keep = torch.rand(batch, patches).topk(3).indices
    same(ma.take(tokens, keep), torch.stack([tokens[b, [0, *(1 + keep[b])]] for b in range(batch)]))


@pytest.mark.parametrize("size, depth", [("tiny", 12), ("small", 12), ("base", 12), ("large", 24)])
def test_every_level_equals_timms(size, depth):
    name = f"vit_{size}_patch16_224"
    assert (ma.VITS[name]["image_size"], ma.VITS[name]["depth"]) == (224, depth)
    ours = ma.vit(name, image_size=(32, 48), depth=2)
    ours.cls_token.data *= 0.1  # as small as the norms' epsilon
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0, img_size=(32, 48), depth=2).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        x = v2.functional.normalize(images / 255, *IMAGENET)
        outputs = theirs.forward_intermediates(
            x, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
        expected = [torch.cat([cls, patches], dim=1) for patches, cls in outputs]
        same(ours(images), expected, atol=1e-5)
        same(ours(images / 255), expected, atol=1e-5)


def test_the_student_equals_loops():
    """Positions, kept patches and drop path, image by image, forward and gradients."""
    torch.manual_seed(0)
    network = shaken(small_vit(image_size=(12, 20), drop_path=0.5)).double().train()
    images, noise = torch.rand(8, 3, 12, 20), torch.rand(8, 6)
    keep = torch.stack([torch.randperm(15)[:4] for _ in range(8)])
    x = v2.functional.normalize(images, *IMAGENET).double()
    kernel, bias = network.patch_embed.parameters()
    x = torch.nn.functional.conv2d(x, kernel, bias, stride=4).flatten(2).mT
    tokens = torch.cat([network.cls_token.expand(8, -1, -1), x], dim=1) + network.pos_embed
    loops = torch.empty(3, 8, 5, 8, dtype=torch.float64)
    for b in range(8):
        x = torch.stack([tokens[b, i] for i in [0, *(1 + keep[b])]])[None]
        for s, block in enumerate(network.blocks):
            p = 0.5 * s / 2
            if noise[b, 2 * s] >= p:
                x = x + block.attn(block.norm1(x)) / (1 - p)
            if noise[b, 2 * s + 1] >= p:
                x = x + block.mlp(block.norm2(x)) / (1 - p)
            loops[s, b] = x[0]
    levels = torch.stack(network(images, keep, path_noise=noise))
    same(levels, loops, atol=1e-5)
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == [
        "pos_embed", "norm.weight", "norm.bias"]
    w = torch.rand_like(loops)  # all others have a gradient
    same(*[torch.autograd.grad((x * w).sum(), trainable(network)) for x in (levels, loops)], 1e-4)


def test_the_student_sees_the_kept_patches_alone_and_in_their_order():
    network, images = small_vit(image_size=(12, 20)), torch.rand(2, 3, 12, 20)
    keep = torch.stack([torch.randperm(15)[:7] for _ in images])
    kept = torch.zeros(2, 15).scatter(1, keep, 1).view(2, 1, 3, 5)
    kept = kept.repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    other = torch.where(kept, images, torch.rand(2, 3, 12, 20))
    same(network(images, keep), network(other, keep))
    with FlopCounterMode(display=False) as flops:
        small_vit(image_size=(12, 20), depth=0)(images, keep)
    assert flops.get_total_flops() == 2 * 2 * 7 * 48 * 8  # B images, V patches, 3·4·4 pixels, D
    for size in ((12, 28), (28, 20)):
        with pytest.raises(RuntimeError, match="[Ss]hape"):
            network(torch.rand(2, 3, *size), keep)
    whole, order = network(images), torch.randperm(15).expand(2, -1)
    same(network(images, torch.arange(15).expand(2, -1)), whole, atol=1e-6)
    same(network(images, order), [ma.take(level, order) for level in whole], atol=1e-5)


def test_drop_path_draws_in_training_only():
    network, images = small_vit(drop_path=0.5).train(), torch.rand(2, 3, 12, 12)
    torch.manual_seed(1)
    drawn = network(images)
    torch.manual_seed(1)
    same(drawn, network(images, path_noise=torch.rand(2, 6)))
    plain, before = small_vit(), torch.get_rng_state()
    same(network.eval()(images, path_noise=torch.zeros(2, 6)), network(images))
    same(plain.train()(images), plain.eval()(images))
    same(before, torch.get_rng_state())


def test_initial_values():
    network = small_vit(image_size=(60, 40), patch_size=20, dim=64)
    same(network.pos_embed[0], ma.sincos_2d(64, (3, 2)))
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    for module in [*network.modules(), *ma.DynamicAlignment(3, 40, 3, 60, 2).modules()]:
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            deviation = (2 / sum(module.weight.flatten(1).shape)) ** 0.5  # Xavier's, uniform
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.05)
            assert module.weight.abs().max() <= 3 ** 0.5 * deviation
            assert module.bias.any() == isinstance(module, torch.nn.Conv2d)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_the_encoder_is_exported_with_a_free_batch_size(dtype):
    network = small_vit(depth=1).eval()
    inputs = (torch.rand(5, 3, 12, 12) * 1.9).to(dtype), torch.rand(5, 9).topk(4).indices
    inputs = inputs[:1 + (dtype == torch.uint8)]  # with keep, or without
    few, batch = tuple(x[:3] for x in inputs), ({0: torch.export.Dim("batch")},) * len(inputs)
    exported = torch.export.export(network, few, dynamic_shapes=batch).module()
    for function in (exported, torch.jit.trace(network, few)):
        same(function(*inputs), network(*inputs), atol=1e-5)


# --- 3.1 Model structure: the frozen teacher ----------------------------------------------------

FAMILIES = [  # timm's real classes; a second word is an option, the last three have no [CLS]
    "vit_base_patch16_224.dino", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_224",
    "vit_base_patch16_224 qk_norm", "vit_base_patch16_224.mae", "vit_base_patch16_radio_v3",
    "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224", "eva02_base_patch16_clip_224",
    "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_256.v2_webli",
    "vit_so150m_patch16_reg4_map_256"]


@pytest.fixture(scope="session", autouse=True)
def small_clip(tmp_path_factory):
    """open_clip knows a small model by the name of ViT-test-14."""
    file = tmp_path_factory.mktemp("clip") / "ViT-test-14.json"
    file.write_text(json.dumps(dict(
        embed_dim=16, quick_gelu=True,
        vision_cfg=dict(image_size=56, layers=3, width=24, head_width=12, patch_size=14),
        text_cfg=dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1))))
    open_clip.add_model_config(file)


def make(kind):
    """A small ViT of random values, E 24 and 3x5 patches: ours, open_clip's or timm's by name."""
    torch.manual_seed(0)
    if kind == "ours":
        return shaken(small_vit(image_size=(42, 70), patch_size=14, dim=24))
    if kind == "open_clip":
        return shaken(open_clip.create_model("ViT-test-14", force_image_size=(42, 70))).visual
    name, *options = kind.split()
    sizes = dict(depth=3, embed_dim=24, num_heads=2, img_size=(42, 70), patch_size=14)
    return shaken(timm.create_model(name, num_classes=0, **sizes, **dict.fromkeys(options, True)))


@pytest.fixture(params=["ours", "open_clip", "vit_small_patch16_dinov3"])
def teacher(request):
    """One of each library, for what every teacher promises."""
    return ma.Teacher(make(request.param), levels=2)


def student_of(teacher, **options):
    """A MaskAlign that learns from a teacher, and images for it."""
    size = tuple(4 * side for side in teacher.grid)
    model = ma.MaskAlign(small_vit(image_size=size, **options), teacher, mask_ratio=0.5)
    return model, torch.rand(2, 3, *size)


@pytest.mark.parametrize("kind", ["ours", "open_clip", *FAMILIES])
def test_levels_and_attention_are_those_of_timms_network(monkeypatch, kind):
    maps, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: (
        maps.append(softmax(self, dim)), maps[-1])[1])
    network, images = make(kind), torch.rand(2, 3, 42, 70)
    theirs = make(dict(ours=FAMILIES[0], open_clip=FAMILIES[1]).get(kind, kind))
    if kind in ("ours", "open_clip"):  # timm reads their weights
        prefix = "visual." if kind == "open_clip" else ""
        state = {prefix + key: x for key, x in network.state_dict().items() if key != "proj"}
        theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, theirs))
    attn = theirs.blocks[-1].attn if theirs.cls_token is not None else theirs.attn_pool
    attn.fused_attn = False  # calls Tensor.softmax
    x = v2.functional.normalize(images, theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
    with torch.no_grad():
        outputs = theirs.forward_intermediates(
            x, 2, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
        theirs(x)
    expected = maps.pop()[:, :, 0, -15:].mean(dim=1)
    maps.clear()
    teacher = ma.Teacher(network, levels=2)
    levels, attention = teacher(images)
    same(attention, expected, atol=1e-6)
    assert max(map(torch.numel, maps)) < 2 * 2 * 15 * 15  # no map of all pairs
    for level, output in zip(levels, outputs, strict=True):
        patches, others = output if isinstance(output, tuple) else (output, None)
        first = patches.mean(1, True) if theirs.cls_token is None else others[:, :1]
        same(level, torch.cat([first, patches], dim=1), atol=5e-5)
    assert (teacher.dim, teacher.depth, teacher.levels, teacher.grid) == (24, 3, 2, (3, 5))
    weights = [id(tensor) for tensor in teacher.state_dict(keep_vars=True).values()]
    assert len(weights) == len(set(weights))  # saved once


def test_images_of_any_size_are_resized_and_of_another_range_refused(teacher):
    images = 255 * torch.randint(0, 2, (2, 3, 40, 30), dtype=torch.uint8)  # bicubic overshoots
    resized = torch.nn.functional.interpolate(images / 255, teacher.image_size, mode="bicubic")
    same(teacher(images), teacher(images / 255), atol=1e-5)
    same(teacher(images), teacher(resized), atol=1e-4)
    for network in (teacher, small_vit()):
        for value in (-0.6, 11.0, 255.0):
            images = torch.rand(2, 3, *network.image_size)
            images[1, 2, 3, 4] = value
            with pytest.raises(ma.UsageError, match=r"float in \[0, 1\]"):
                network(images)


def test_a_student_learns_from_a_frozen_teacher(teacher):
    before, random_state = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    levels, attention = teacher.train()(torch.rand(
        2, 3, *teacher.image_size, generator=torch.Generator(), requires_grad=True))
    same(random_state, torch.get_rng_state())
    assert not any(module.training for module in teacher.modules())
    assert not any(x.requires_grad for x in [*teacher.parameters(), *levels, attention])
    model, images = student_of(teacher, depth=2)
    assert not any(key.startswith("teacher") for key in model.state_dict())
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(4):
        losses.append(model(images, *teacher(images), mask_noise=torch.full((2, 15), 0.5)))
        losses[-1].backward()
        assert all(p.grad is not None for p in trainable(model))
        optimiser.step()
        optimiser.zero_grad()
    assert losses == sorted(losses, reverse=True)
    same(teacher.state_dict(), before)


def test_calls_and_copies_of_a_teacher_are_independent(teacher):
    images, twin = torch.rand(2, 3, *teacher.image_size), copy.deepcopy(teacher)
    expected = teacher(images)
    mlp = [module for name, module in teacher.named_modules() if name.endswith("2.mlp")][0]
    handle = mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher(images * 0)
    handle.remove()
    same([teacher(images), teacher(images)], [expected, expected])
    for value in vars(teacher).values():  # no image's features
        assert not any(map(torch.is_tensor, value if isinstance(value, list) else [value]))
    shaken(teacher)
    same(twin(images), expected)
    assert not torch.equal(teacher(images)[1], expected[1])


@pytest.mark.parametrize("kind", ["ours", "open_clip", "vit_small_patch16_dinov3", "student"])
def test_each_network_is_one_graph_compiled_once(kind):
    network, counter = ma.Teacher(make("ours" if kind == "student" else kind), 2), CompileCounter()
    inputs = [torch.rand(2, 3, 42, 70)]
    if kind == "student":
        seen = network(*inputs)
        network, images = student_of(network, drop_path=0.5)
        inputs = [images, *seen, None, torch.rand(2, 15), torch.rand(2, 6)]  # mask's, drop path's
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for _ in range(3):
        same(compiled(*inputs), network(*inputs), atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name, says", [
    ("resnet18", "a ResNet cannot teach"), ("beit_base_patch16_224", "a Beit cannot teach"),
    ("swin_tiny_patch4_window7_224", "a SwinTransformer cannot teach"),
    ("vit_small_r26_s32_224", "no plain ViT"), ("vit_relpos_base_patch16_cls_224", "no plain ViT"),
    ("vit_base_patch16_xp_224", "no plain softmax"),
    ("vit_small_patch16_dinov3 num_kv_groups", "no plain softmax"),  # heads that share keys
    ("vit_base_patch16_rope_reg1_gap_256", "no .CLS. and no pooling query"),
])
def test_a_network_that_cannot_teach_is_refused(name, says):
    name, *numbers = name.split()
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    for number in numbers:
        setattr(network.blocks[-1].attn, number, 2)
    with pytest.raises(ma.UsageError, match=says):
        ma.Teacher(network)


# --- 3.2 Masking strategy -----------------------------------------------------------------------

@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 99))
@example(3, 196, 70)  # the paper's 58
@example(3, 10, 90)  # 1, not 0
def test_keep_is_distinct_in_range_and_of_exact_length(batch, patches, percent):
    count = int(patches * (1 - Fraction(percent, 100)))
    assume(count)
    for keep in (ma.random_keep(batch, patches, percent / 100),
                 ma.attentive_keep(torch.rand(batch, patches), percent / 100)):
        assert keep.shape == (batch, count)
        assert keep.min() >= 0 and keep.max() < patches
        assert all(len(set(row)) == count for row in keep.tolist())


@given(st.integers(0, 17))
def test_patches_without_attention_are_kept_once_the_others_run_out(positive):
    attention = torch.zeros(5, 20)
    attention[:, 3:3 + positive] = 0.01
    for noise in (None, torch.zeros(5, 20)):
        for row in ma.attentive_keep(attention, 0.5, noise).tolist():
            assert len(set(row)) == 10
            assert sum(3 <= i < 3 + positive for i in row) == min(positive, 10)


def test_keep_frequency_is_that_of_sampling_without_replacement():
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    exact = torch.tensor([sum(p[i] * p[j] / (1 - p[i]) for i in range(4) for j in range(4)
                              if i != j and n in (i, j)) for n in range(4)])
    one = torch.tensor([[0, 1e-45, 0, 0]])  # and then the rest
    for keep, expected in (
            (ma.attentive_keep(p.expand(40000, 4), 0.5), exact),
            (ma.attentive_keep(one.expand(40000, 4), 0.5), torch.tensor([1 / 3, 1, 1 / 3, 1 / 3])),
            (ma.random_keep(40000, 4, 0.5), torch.tensor([0.5, 0.5, 0.5, 0.5]))):
        same(torch.nn.functional.one_hot(keep, 4).sum(1).float().mean(0), expected, atol=0.01)


# --- 3.3 Dynamic alignment ----------------------------------------------------------------------

@given(st.floats(0.5, 4), st.floats(-3, 3))
def test_whitened_features_have_mean_0_and_variance_1_at_any_scale(scale, shift):
    y = torch.randn(3, 5, 64, dtype=torch.float64) * 3
    white = ma.whiten(y)
    same(white.mean(-1), torch.zeros(3, 5).double(), atol=1e-6)
    same(white.var(-1, unbiased=False), torch.ones(3, 5).double(), atol=1e-4)
    same(ma.whiten(scale * y + shift), white, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whitening_and_loss_are_in_fp32_or_finer(dtype):
    y, finer = torch.tensor([0.0, 1e-3], dtype=dtype), torch.promote_types(dtype, torch.float32)
    assert ma.whiten(y)[1].item() == pytest.approx(5e-4 / (2.5e-7 + 1e-5) ** 0.5, rel=5e-3)
    assert ma.whiten(y).dtype == ma.align_loss(y, y.to(finer)).dtype == finer


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=9))
def test_align_loss_is_the_piecewise_formula(values):
    d = torch.tensor(values, dtype=torch.float64)
    target = torch.randn(len(values), dtype=torch.float64)
    expected = sum(0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5 for x in values) / len(values)
    assert ma.align_loss(target + d, target).item() == pytest.approx(expected, abs=1e-9)
    assert ma.align_loss(target, target) == 0
    pred = (target + d / 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda pred: ma.align_loss(pred, target), pred)


@pytest.mark.parametrize("student, teacher, levels", [(3, 5, 2), (5, 3, 3), (2, 4, 1), (4, 4, 3)])
def test_dynamic_alignment_equals_loops(student, teacher, levels):
    align = ma.DynamicAlignment(student, 7, teacher, 11, levels).double()
    features = [torch.randn(2, 3, 7, dtype=torch.float64) for _ in range(student)]
    out = torch.stack(list(align(features)))
    loops = torch.stack([adaptor(sum(row[s] * features[s] for s in range(student)))
                         for adaptor, row in zip(align.adaptors, align.matrix, strict=True)])
    same(out, loops, atol=1e-9)
    w = torch.randn(out.shape, dtype=torch.float64)
    same(*[torch.autograd.grad((x * w).sum(), align.parameters()) for x in (out, loops)], 1e-9)


@pytest.mark.parametrize("student, teacher, matched", [
    (12, 12, [7, 8, 9, 10, 11]), (3, 5, [0, 1, 1, 2, 2]), (5, 5, [0, 1, 2, 3, 4]),
    (24, 12, [15, 17, 19, 21, 23]), (12, 24, [9, 10, 10, 11, 11])])
def test_the_matrix_starts_with_a_1_per_row_at_matching_depth(student, teacher, matched):
    matrix = ma.DynamicAlignment(student, 4, teacher, 4, 5).matrix.detach()
    same(matrix, torch.eye(student)[matched] + 0.01, atol=1e-6)


def test_autocast_does_not_round_the_mixture():
    align, mixed = ma.DynamicAlignment(1, 4, 1, 5, 1), []
    align.adaptors[0].register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        align([torch.ones(1, 1, 4)])
    same(mixed, [torch.full((1, 1, 4), 1.01)], atol=1e-6)


# --- MaskAlign: the whole method ----------------------------------------------------------------

def test_the_loss_is_the_papers_formula():
    torch.manual_seed(0)
    teacher = ma.Teacher(small_vit(dim=12), 2)
    model, images = student_of(teacher)
    levels, attention = teacher(images)
    levels, keep = [3 * level + 1 for level in levels], torch.tensor([[0, 4, 7, 3], [8, 2, 1, 5]])
    x, expected = model.student(images, keep), 0
    for k in range(2):
        p = model.align.adaptors[k](sum(model.align.matrix[k, s] * x[s] for s in range(3)))
        y = torch.stack([levels[k][b, [0, *(keep[b] + 1)]] for b in range(2)])
        y = (y - y.mean(-1, True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        d = (p - y).abs()
        expected += torch.where(d <= 1, d * d / 2, d - 0.5).mean() / 2
    same(model(images, levels, attention, keep), expected, atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])  # of the visible patches does not matter
    same(model(images, levels, attention, keep[:, order]), expected, atol=1e-6)


@pytest.mark.parametrize("mask", ["attentive", "random"])
def test_the_mask_is_attentive_or_random_as_asked(mask):
    teacher = SimpleNamespace(grid=(3, 3), depth=4, dim=12, levels=2)  # all that is read of one
    images, levels = torch.rand(2, 3, 12, 12), torch.rand(2, 2, 10, 12)
    attention = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 1]).expand(2, -1) / 4
    mask_noise, path_noise = torch.rand(2, 9), torch.rand(2, 6)
    model = ma.MaskAlign(small_vit(drop_path=0.5), teacher, mask, 0.5).train()
    keep = (mask_noise * attention if mask == "attentive" else mask_noise).topk(4, dim=1).indices
    loss = model(images, levels, attention, mask_noise=mask_noise, path_noise=path_noise)
    same(loss, model(images, levels, attention, keep, path_noise=path_noise))


def test_bf16_has_the_loss_and_gradients_of_fp32(teacher):
    model, images = student_of(teacher, drop_path=0.1)
    images, noise = torch.rand(64, 3, *images.shape[2:]), torch.rand(64, 6)
    seen, results = teacher(images), []
    keep = ma.attentive_keep(seen[1], 0.7)  # in bf16 now and then another
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images, *seen, keep, path_noise=noise)
        results.append((seen, loss, torch.autograd.grad(loss, trainable(model))))
        seen = teacher.to(torch.bfloat16)(images)
    ((_, expected), exact, exact_gradients), ((levels, attention), loss, gradients) = results
    assert all(level.dtype == torch.bfloat16 for level in levels)
    assert loss.dtype == attention.dtype == torch.float32
    same(attention, expected, atol=4e-3)
    assert abs(loss / exact - 1) < 5e-4
    for a, b in zip(exact_gradients, gradients, strict=True):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("call, says", [
    (lambda: ma.vit("nope"), "unknown ViT 'nope'.*vit_tiny_patch16_224"),
    *[(lambda x=x: small_vit(**x), "patches of 4 must tile .* divide the width") for x in
      (dict(image_size=(12, 14)), dict(image_size=(14, 12)), dict(heads=3), dict(dim=10))],
    *[(lambda x=x: ma.random_keep(3, 10, x), "mask ratio .* no visible patch of 10")
      for x in (0.95, 1.0, -0.1, 1.5, math.nan)],
    *[(lambda x=x: ma.attentive_keep(torch.tensor([[0.5, x]]), 0.5), "attention is negative or NaN")
      for x in (-0.1, math.nan)],
    *[(lambda x=x: ma.Teacher(small_vit(), x), f"depth 3: {x}") for x in (0, 4)],
    (lambda: ma.MaskAlign(small_vit(), ma.Teacher(small_vit(), 2), "attention"), "'attention'"),
    (lambda: ma.MaskAlign(small_vit(), ma.Teacher(small_vit(), 2), "random", 0.95), "patch of 9"),
    (lambda: ma.MaskAlign(small_vit(image_size=(4, 36)), ma.Teacher(small_vit(), 2)), "s differ"),
])
def test_arguments_that_do_not_fit_raise_a_usage_error(call, says):
    with pytest.raises(ma.UsageError, match=says) as error:
        call()
    assert isinstance(error.value, ValueError)


# --- Weights from files -------------------------------------------------------------------------

class Planted:
    def __reduce__(self):
        return (Path("evil-was-here").touch, ())


X = torch.zeros(2)
BESIDE = dict(args=argparse.Namespace(lr=0.1, out=Path("out"), nested=dict(a=[1, None])), rest=[
    Planted(), Planted, print, {1, 2}, signal.SIGINT, PureWindowsPath("C:/out"), time.gmtime(),
    numpy.float64(0.5), numpy.array([None, "a"]), numpy.dtype("f4"), numpy.random.get_state(),
    collections.defaultdict(list, a=[1]), collections.deque([1]), bytes(2), slice(1),
    torch.float16, torch.device("cuda:1"), torch.Size([3]), torch.nn.Parameter(X),
    torch.eye(2).to_sparse(), X.to(torch.uint16)])


def named(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def without(prefix, state):
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


FORMATS = {  # how a checkpoint holds an encoder's state s, and what else
    "ours": (lambda s: dict(student=s, align=dict(matrix=X), step=3), "align step"),
    "timm": (lambda s: s | {"head.weight": X, "epoch": 3}, "head.weight"),
    "timm's training": (lambda s: dict(BESIDE, arch="x", state_dict=s), "arch args rest"),
    "MAE": (lambda s: dict(BESIDE, model=s | dict(mask_token=X) | {"decoder_embed.weight": X}),
            "args decoder_embed.weight mask_token rest"),
    "classifier": (lambda s: without("norm.", s) | {"fc_norm.bias": X, "head.bias": X},
                   "fc_norm.bias head.bias"),
    "DINO": (lambda s: dict(student=named("module.backbone.", small_vit().state_dict()), teacher={
        **named("module.backbone.", s), "module.head.mlp.0.bias": X}), "head.mlp.0.bias student"),
    "official": (lambda s: dict(model={**named("model.", s), "distill_w": X, "clip_model.x": X}),
                 "clip_model.x distill_w"),
    "DINOv2": (lambda s: dict(teacher={"dino_head.x": X, "ibot_head.x": X} | {
        "backbone." + key.replace("blocks.", "blocks.0."): x for key, x in s.items()}),
        "dino_head.x ibot_head.x"),
    "MoCo v3": (lambda s: dict(state_dict=named("module.base_encoder.", s | {"head.0.bias": X}) | {
        "module.momentum_encoder.norm.bias": X, "module.predictor.0.bias": X}),
        "head.0.bias momentum_encoder.norm.bias predictor.0.bias"),
    "wrapped": (lambda s: dict(state_dict=dict(module=named("_orig_mod.student.encoder.", s))), ""),
    "before 2020": (lambda s: dict(BESIDE, model=s), "args rest"),
    "trainable": (lambda s: {0: 1, "model": {k: torch.nn.Parameter(x) for k, x in s.items()}}, "0"),
    "safetensors": (lambda s: s, ""),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_an_encoder_loads(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    source, target = shaken(small_vit()), small_vit()
    state, before = source.state_dict(), copy.deepcopy(target.state_dict())
    content, aside = FORMATS[kind][0](state), FORMATS[kind][1].split()
    if kind == "safetensors":
        safetensors.torch.save_file(content, f"a.{kind}")
    else:
        torch.save(content, f"a.{kind}", _use_new_zipfile_serialization=kind != "before 2020")
    assert ma.load_encoder(target, f"a.{kind}") == aside
    if kind == "classifier":  # it has no norm; ours stays
        state |= {key: x for key, x in before.items() if key.startswith("norm.")}
    same(target.state_dict(), state)
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize("old, new, noise", [
    ((4, 4), (2, 8), 0.1), ((2, 8), (4, 4), 0.1), ((2, 8), (5, 5), 0.1), ((3, 5), (5, 5), 0.1),
    ((4, 4), (3, 5), 9), ((2, 8), (2, 8), 9)])  # learned ones do not tell their grid
def test_positions_are_resampled_to_the_grid(tmp_path, old, new, noise):
    source, target = [small_vit(image_size=[4 * n for n in grid], dim=32) for grid in (old, new)]
    source.pos_embed.data += noise * torch.rand_like(source.pos_embed)
    torch.save(source.half().state_dict(), tmp_path / "file.pt")
    ma.load_encoder(target, tmp_path / "file.pt")
    x = source.pos_embed[:, 1:].float().mT.view(1, 32, *old)
    x = torch.nn.functional.interpolate(x, new, mode="bicubic", align_corners=False)
    same(target.pos_embed[:, 1:], x.flatten(2).mT, atol=1e-6)
    same(target.pos_embed[:, 0], source.pos_embed[:, 0].float())


@pytest.mark.parametrize("change, says", [
    (lambda s: small_vit(depth=4).state_dict(), 'Unexpected key.*"blocks.3.norm1.weight"'),
    (lambda s: small_vit(dim=12).state_dict(), r"mismatch for cls_token.*\[1, 1, 12\].*\[1, 1, 8"),
    (lambda s: without("pos_embed", s), 'Missing key.*"pos_embed"'),
    (lambda s: {**s, "pos_embed": s["pos_embed"][:, 1:]}, r"size mismatch for pos_embed.*8\]"),
    (lambda s: named("teacher.", s), '"teacher.cls_token"'),
    (lambda s: {"conv1.weight": X, 0: X}, 'it holds conv1.weight, 0; .*Missing key.*"cls_token"'),
    (lambda s: shaken(small_vit(image_size=(12, 20))).state_dict(), r"for pos_embed.*16, 8\]"),
    (lambda s: named("vit.embeddings.", s), "vit.embeddings.cls_token.*Hugging Face"),
    (lambda s: {"conv_proj.weight": X}, "it holds conv_proj.weight.*torchvision"),
])
def test_differences_to_another_architecture_are_named(tmp_path, change, says):
    torch.save(change(small_vit().state_dict()), tmp_path / "file.pt")
    with pytest.raises(ma.UsageError, match=f"file.pt does not fit the encoder: .*{says}") as error:
        ma.load_encoder(small_vit(), tmp_path / "file.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def damaged(file):
    """Weights with a changed bit, which torch does not notice."""
    torch.save({"x": torch.zeros(5000)}, file)
    Path(file).write_bytes(Path(file).read_bytes().replace(bytes(4000), b"\1" + bytes(3999), 1))


@pytest.mark.parametrize("name, write, says", [
    ("script.pt", lambda f: torch.jit.script(torch.nn.Identity()).save(f), "TorchScript"),
    ("bit.pt", damaged, "in bit/data/0"), ("list.pt", lambda f: torch.save([X], f), "no dict"),
    ("text.pt", lambda f: Path(f).write_text("no weights"), "."),
    ("text.safetensors", lambda f: Path(f).write_text("no weights"), "."),
    ("empty.pt", lambda f: Path(f).touch(), "."), ("missing.pt", lambda f: None, "No such file"),
    ("missing.safetensors", lambda f: None, "No such file"),
])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_file_without_weights_is_one_line(tmp_path, monkeypatch, name, write, says):
    monkeypatch.chdir(tmp_path)
    write(name)
    with pytest.raises(ma.UsageError, match=f"^{name} was not read: .*({says})") as error:
        ma.read_weights(name)
    assert not {"\x1b", "\n"} & {*str(error.value)} and error.value.__cause__ is not None


# --- Teachers by name ---------------------------------------------------------------------------

@pytest.fixture
def asked(monkeypatch):
    """Any network of timm and open_clip is made small and of random values; what was asked for."""
    names, timms, clips = [], timm.create_model, open_clip.create_model

    def small_timm(name, pretrained=False, **options):
        names.append((name, pretrained))
        return shaken(timms(name.removeprefix("hf-hub:"), depth=2, embed_dim=24, **options))

    def small_clip(name, pretrained=None, **options):
        names.append((name, pretrained))
        return clips("ViT-test-14", None if pretrained == "openai" else pretrained, **options)

    monkeypatch.setattr(timm, "create_model", small_timm)
    monkeypatch.setattr(open_clip, "create_model", small_clip)
    return names


@pytest.mark.parametrize("library, name, patch, needed", [
    ("ours", "vit_digits_patch4_32", 4, "pos_embed"),
    ("open_clip", "ViT-test-14", 14, "conv1.weight"),
    ("timm", "vit_small_patch14_reg4_dinov2.lvd142m", 14, "blocks.1.ls1.gamma"),
    ("timm", "vit_base_patch16_siglip_224", 16, "norm.bias")])  # which the pooling query reads
@pytest.mark.filterwarnings("error")
def test_a_teacher_from_a_file_at_any_grid(tmp_path, asked, library, name, patch, needed):
    create = dict(ours=ma.vit, open_clip=open_clip.create_model, timm=timm.create_model)[library]
    source, file = shaken(create(name)), tmp_path / "file.pt"
    state = source.state_dict()
    if "reg4" in name:  # as its authors publish it
        state |= dict(mask_token=X, register_tokens=state.pop("reg_token"))
        state["pos_embed"] = torch.nn.functional.pad(state["pos_embed"], (0, 0, 1, 0))
    torch.save(dict(BESIDE, state_dict=named("module.", state)), file)
    own = ma.load_teacher(name, str(file), levels=2)
    images = torch.rand(2, 3, *own.image_size)
    same(own(images), ma.Teacher(getattr(source, "visual", source), 2)(images))
    teacher = ma.load_teacher(name, file, levels=2, grid=(4, 6))
    assert teacher(images)[1].shape == (2, 24) and teacher.image_size == (4 * patch, 6 * patch)
    same(*[without("pos", network.network.state_dict()) for network in (own, teacher)])
    torch.save({key: x for key, x in state.items() if not key.endswith(needed)}, file)
    with pytest.raises(ma.UsageError, match=f'Missing.*"{needed}"'):
        ma.load_teacher(name, file)
    with pytest.warns(UserWarning, match=f"teacher {name} has random weights"):
        assert ma.load_teacher(name, levels=2).levels == 2


@pytest.mark.parametrize("name, weights", [
    ("vit_tiny_patch16_224", True),  # timm's, although VITS has the name too
    ("vit_base_patch16_clip_224.laion2b", True), ("ViT-B-16-quickgelu", "openai"),
    ("vit_base_patch16_clip_quickgelu_224.openai", True), ("hf-hub:vit_tiny_patch16_224", True)])
def test_published_weights_are_asked_for_by_name(asked, name, weights):
    teacher = ma.load_teacher(name, "pretrained", 1, (2, 3))
    assert asked == [(name, weights)] and teacher.grid == (2, 3) and teacher.levels == 1


def test_timms_openai_clip_is_refused_without_quickgelu(asked):
    with pytest.raises(ma.UsageError, match="QuickGELU.*clip_quickgelu"):
        ma.load_teacher("vit_base_patch16_clip_224.openai", "pretrained", 1)
    with pytest.warns(UserWarning, match="random weights"):
        ma.load_teacher("vit_base_patch16_clip_224.openai", levels=1)


@pytest.mark.parametrize("name, weights, says", [
    ("ViT-test-14", "", "not read"),
    ("ViT-B-16-quickgellu", None, "no plain ViT"), ("resnet18", None, "a ResNet cannot teach"),
    ("RN50", None, "RN50 cannot teach"), ("ViT-B-16-SigLIP", None, "SigLIP cannot teach"),
    ("ViT-B-16", "openai", "openai and ViT-B-16 differ in QuickGELU"),
    ("ViT-test-14", "missing.pt", "missing.pt was not read: .*No such file"),
    ("vit_digits_patch4_32", "missing.pt", "missing.pt was not read: .*No such file"),
    ("vit_tiny_patch16_224", "pretrained", "teacher vit_tiny_patch16_224 .*--teacher-weights FILE"),
    ("ViT-B-16-quickgelu", "pretrained", "--teacher-weights FILE needs no download: .*openai"),
    ("hf-hub:nobody/nothing", "pretrained", "--teacher-weights FILE needs no download"),
    ("local-dir:missing", "pretrained", "--teacher-weights FILE needs no download"),
])
@pytest.mark.filterwarnings("ignore:teacher .* has random weights")
def test_a_teacher_that_fails_is_one_line(monkeypatch, capsys, caplog, name, weights, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(logging.root.manager, "disable", 7)
    with pytest.raises(ma.UsageError, match=says) as error:
        ma.load_teacher(name, weights, grid=(4, 6))
    assert "\n" not in str(error.value).strip()
    assert ("was not made" in str(error.value)) == ("--teacher-weights FILE" in says)
    assert not caplog.records and "ERROR" not in capsys.readouterr().err
    assert logging.root.manager.disable == 7


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(ma.ViT, "load_state_dict", lambda *args: int(None))
    torch.save(small_vit().state_dict(), tmp_path / "file.pt")
    with pytest.raises(TypeError):
        ma.load_teacher("vit_digits_patch4_32", tmp_path / "file.pt")
    monkeypatch.setattr(ma.Teacher, "__init__", lambda *args: {}["bug"])
    with pytest.raises(KeyError):
        ma.load_teacher("vit_tiny_patch16_224", "pretrained")


# --- Processes: real ones, but forked from a server that has imported what takes seconds, unless --
# --- that has started threads, as it does where there is a GPU: they then begin anew -------------

CHILD = """
import atexit, json, os, resource, runpy, signal, sys, traceback
order = json.loads({line!r})
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
for stream, name in enumerate(("/dev/null", order["folder"] + "/out", order["folder"] + "/err")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), stream)
os.environ.clear()
os.environ.update(order["env"])
os.chdir(order["cwd"])
if encoding := order["env"].get("PYTHONIOENCODING"):
    sys.stdout.reconfigure(encoding=encoding)
    sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
if order["largest_file"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, [order["largest_file"]] * 2)
sys.path[0] = order["here"]
sys.argv = [order["script"], *order["argv"]]
code = 0
try:
    exec(order["first"], {{}})                       # hooks on torch's modules and optimisers
    runpy.run_path(order["script"], run_name="__main__")
except SystemExit as stop:
    code = stop.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(code)                                       # to unload all modules would take seconds
"""

SERVER = """
import atexit, json, os, resource, runpy, select, signal, sys, traceback
import einops, open_clip, timm, torch, torch._dynamo, torchvision.transforms.v2, tqdm
torch.set_num_threads(1)
tasks = "/proc/self/task"
threads = os.path.isdir(tasks) and len(os.listdir(tasks)) > 1  # CUDA's; a fork would lack them
print("ready", flush=True)
running = {}
while True:
    ready, _, _ = select.select([0], [], [], 0.02)
    line = sys.stdin.readline() if ready else None
    if line == "":                                   # the tests are over
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
        os._exit(0)
    if line and not (pid := os.fork()):
        break                                        # the child leaves the loop
    if line:
        running[pid] = json.loads(line)["folder"]
        print(pid, flush=True)
    while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        with open(running.pop(ended[0]) + "/code.part", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(ended[1])))
        os.replace(file.name, file.name.removesuffix(".part"))
child = CHILD.format(line=line)
if threads or json.loads(line)["anew"]:
    os.execv(sys.executable, [sys.executable, "-c", child])
exec(child)
""".replace("CHILD", repr(CHILD), 1)


class Child:
    """A process that runs a script with arguments; to be waited for, read, or killed."""
    server, queue = None, concurrent.futures.ThreadPoolExecutor(1)  # the server imports for seconds

    @classmethod
    def call(cls, order):
        if cls.server is None:
            single = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1",
                          CUDA_VISIBLE_DEVICES="")
            cls.server = subprocess.Popen([sys.executable, "-c", SERVER], env=single, text=True,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if order is None:
            return None
        cls.server.stdin.write(json.dumps(order) + "\n")
        cls.server.stdin.flush()
        while (line := cls.server.stdout.readline()) == "ready\n":
            pass
        return int(line)

    def __init__(self, *argv, first="", script=HERE / "train.py", largest_file=0, cwd=None,
                 anew=False, **env):
        self.folder, self.done = Path(tempfile.mkdtemp(prefix="child-")), None
        self.started = self.queue.submit(self.call, dict(
            folder=str(self.folder), here=str(HERE), script=str(script), first=first, anew=anew,
            argv=list(map(str, argv)), cwd=str(cwd or os.getcwd()), largest_file=largest_file,
            env={**os.environ, "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in env.items()}))

    @property
    def pid(self):
        return self.started.result()

    @property
    def code(self):
        """The exit status, minus the signal's number if one ended it; None while it runs."""
        file = self.folder / "code"
        return int(file.read_text()) if file.exists() else None

    def text(self, stream):
        file = self.folder / stream
        return file.read_text(errors="replace") if file.exists() else ""

    def kill(self):
        if self.done is None and self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, code=None, seconds=120):
        """Its output, once it has ended, with this exit status where one is asked for."""
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            time.sleep(0.01)
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(self.text("err"))
        with contextlib.suppress(ProcessLookupError):  # what it may have started
            os.killpg(self.pid, signal.SIGKILL)
        self.done = SimpleNamespace(out=self.text("out"), err=self.text("err"), code=self.code)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert code is None or self.done.code == code, self.done
        return self.done


Child.queue.submit(Child.call, None)  # it imports while the first tests run


def run(*argv, code=0, **more):
    return Child(*argv, **more).wait(code)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_ranks(*argv, ranks=2, **more):
    """The processes that torchrun would start, without torchrun."""
    world = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=free_port())
    return [Child(*argv, RANK=rank, LOCAL_RANK=rank, **world, **more) for rank in range(ranks)]


def run_ranks(*argv, code=0, **more):
    return [child.wait(code) for child in start_ranks(*argv, **more)]


def main(*argv):
    """The script in this process."""
    train.main(list(map(str, argv)))


def parse(*argv):
    return train.parse(list(map(str, argv)))


def refused(capsys, *argv):
    """The one line with which the script refuses a command, in this process."""
    capsys.readouterr()
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("ignore")
        main(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("train.py:") == 1, error
    return error.strip().splitlines()[-1]


def one_line(done, code=2):
    """The one line with which a process ended."""
    assert done.code == code and done.err.count("train.py:") == 1, done
    assert "Traceback" not in done.err, done
    return done.err.strip().splitlines()[-1]


# What a process is to do at a step, through the hooks that torch has for all optimisers. Steps
# count from 1; a step's hook runs once its weights are there, and before anything is saved.
AT_STEP = """
import os, signal, sys, time, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
taken = []
def note(optimiser, *_):
    taken.append(1)
    if len(taken) == {step}:
        {action}
register_optimizer_step_post_hook(note)
"""


def at_step(step, action):
    return AT_STEP.format(step=step, action=action.strip())


def signalled(step, name="SIGKILL"):
    return at_step(step, f"os.kill(os.getpid(), signal.{name})")


@pytest.fixture
def hooks():
    """Registers torch's hooks of all modules and optimisers; they end with the test."""
    handles = []

    def register(function):
        return lambda hook: handles.append(function(hook))
    modules = torch.nn.modules.module
    yield SimpleNamespace(
        before_step=register(register_optimizer_step_pre_hook),
        after_step=register(register_optimizer_step_post_hook),
        before_forward=register(modules.register_module_forward_pre_hook),
        after_forward=register(modules.register_module_forward_hook))
    for handle in handles:
        handle.remove()


class Calls(TorchFunctionMode):
    """Notes the arguments of each call of one of torch's functions."""
    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is self.function:
            self.seen.append((arguments, options or {}))
        return function(*arguments, **options or {})


# --- Folders of images, runs on them, and what these leave ---------------------------------------

TASKS = ("pretrain", "finetune", "probe")
SMALL = ("--student", "vit_digits_patch4_32", "--teacher", "vit_digits_patch4_32",
         "--teacher-weights", "random", "--levels", 3, "--device", "cpu", "--workers", 0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes of 12 + 4 noisy colours; the names are long, spaced and not ASCII."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("val", 4)):
        for label, colour in enumerate(((200, 20, 20), (20, 200, 20), (20, 20, 200))):
            for i in range(count):
                file = root / split / f"class {label} é" / f"{'long ' * 20}{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((60, 45), 90).convert("RGB").point(
                    [min(255, v // 3 + c) for c in colour for v in range(256)]).save(file)
    return root


def paint(file, colour, size=(60, 45)):
    """A picture of one colour: however it is cropped, it can be told from others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def shade(i):
    """The colour of picture i."""
    return 7 * i, 255 - 7 * i, i % 2 * 200


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    """36 training and 5 evaluation pictures of two classes, each of a colour of its own."""
    root = tmp_path_factory.mktemp("painted")
    for i in range(36):
        paint(root / "train" / "ab"[i % 2] / f"{i}.png", shade(i))
    for i in range(5):
        paint(root / "val" / "ab"[i % 2] / f"{i}.png", shade(i))
    return root


def which(images):
    """The numbers of pictures [B,3,H,W], uint8, by their colours."""
    return [round(red / 7) for red in images[:, 0].double().mean((1, 2)).tolist()]


def on_folder(root, out, *more):
    """12 steps, 3 an epoch."""
    return ("--data", root, "--out", out, *SMALL, "--batch-size", 12, "--epochs", 4,
            "--warmup-epochs", 1, "--eval-every", 2, *more)


def digits(out, *more):
    return ("--data", "digits:96", "--out", out, *SMALL, "--batch-size", 24, "--epochs", 3,
            "--eval-every", 100, *more)


def sources(root, *more, size=(32, 32)):
    return train.open_data(parse("--data", root, *more), size)


def last(out):
    return torch.load(Path(out) / "last.pt")


def saved(out):
    """The step of last.pt, or -1."""
    return last(out)["step"] if (Path(out) / "last.pt").exists() else -1


def logged(out, key="step"):
    with open(Path(out) / "log.jsonl") as log:
        return [json.loads(line, parse_constant=pytest.fail).get(key) for line in log]


def weights(out):
    return torch.load(Path(out) / "student.pt")


def same(a, b, atol=0):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)


def equal(a, b):
    """Whether two trees of dicts, lists, tensors and primitives are the same bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def state(out):
    """What last.pt holds, without the times in the log."""
    content = last(out)
    for record in content["log"]:
        del record["images_per_s"], record["data_wait"]
    return content


def reach(child, out, step, seconds=120):
    until = time.monotonic() + seconds
    while saved(out) < step:
        running = child.code is None if isinstance(child, Child) else child.poll() is None
        assert running and time.monotonic() < until
        time.sleep(0.02)


def torchrun(*argv, script=HERE / "train.py", options=()):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
         str(free_port()), *options, str(script), *map(str, argv)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """What takes longest begins first and runs beside the tests, if its own is asked for: processes
    and their --out, by the test's name."""
    asked, started = {item.originalname for item in request.session.items}, {}
    fixture = request.getfixturevalue

    def begin(test, start):
        if test in asked:
            out = tmp_path_factory.mktemp("background") / "out"
            started[test] = start(out), out
    begin("test_demo_trains_teacher_and_student_with_its_flags", lambda out: Child(
        "--epochs", 0.01, "--micro-batch", 32, "--device", "cpu", "--image-size", "16x24",
        "--out", out))
    begin("test_torchrun_restarts_after_a_killed_rank", lambda out: torchrun(
        *for_two(fixture("folder"), out), options=("--max-restarts", "1"), script=killed_once(out)))
    begin("test_workers_change_nothing_in_a_script_without_a_guard", lambda out: Child(
        *with_all(fixture("wild"), out), "--workers", 2, script=unguarded(out)))
    begin("test_a_killed_worker_ends_the_run_and_it_goes_on", lambda out: Child(
        *on_folder(fixture("folder"), out), "--save-every", 5, "--workers", 1,
        first=at_step(7, KILL_WORKERS)))
    yield started
    for process, _ in started.values():
        process.kill()


def with_all(wild, out):
    """A command whose images and noise depend on all that there is."""
    return on_folder(wild, out, "--task", "finetune", "--drop-path", 0.3, "--epochs", 2)


def for_two(folder, out):
    """A command for two ranks, with accumulation."""
    return on_folder(folder, out, "--save-every", 5, "--micro-batch", 3)


def killed_once(out):
    """A script: rank 1 is killed after step 7, the first time that it gets there."""
    mark, script = out.parent / "killed", out.parent / "script.py"
    script.write_text(at_step(7, f"""
        if os.environ["RANK"] == "1" and not os.path.exists({str(mark)!r}):
            open({str(mark)!r}, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)""") + f"""
sys.path.insert(0, {str(HERE)!r})
import train
train.main()
""")
    return script


def unguarded(out):
    """A script that calls the training without `if __name__ == "__main__"`."""
    script = out.parent / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import train
train.main(sys.argv[1:])
""")
    return script


KILL_WORKERS = """
        def children(pid):
            return open(f"/proc/{pid}/task/{pid}/children").read().split()
        for server in children(os.getpid()):
            for worker in children(server):
                os.kill(int(worker), signal.SIGKILL)"""


# --- Recipes and command line --------------------------------------------------------------------

def test_recipes_are_the_papers():
    keys = ("epochs batch_size blr min_lr warmup_epochs weight_decay drop_path layer_decay "
            "eval_every").split()
    for task, data, numbers in (
            ("pretrain", "x", (200, 1024, 1.5e-4, 1e-5, 20, 0.05, 0.1, 1, 20)),
            ("finetune", "x", (100, 1024, 3e-4, 1e-6, 5, 0.05, 0.2, 0.55, 1)),
            ("probe", "x", (90, 16384, 0.025, 0, 10, 0, 0, 1, 1)),
            ("finetune", "digits", (1, 64, 8e-3, 1e-6, 0.1, 0.05, 0, 1, 1))):
        args = vars(parse("--task", task, "--data", data))
        assert tuple(args[key] for key in keys) == numbers
    assert vars(parse("--data", "x")).items() >= dict(
        student="vit_base_patch16_224", teacher="ViT-B-16-quickgelu", teacher_weights="pretrained",
        levels=5, mask="attentive", mask_ratio=0.7, seed=0, task="pretrain").items()
    assert train.KNN == dict(k=20, temperature=0.07) and train.LOG_EVERY == 10


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    flags = [f"--{name.replace('_', '-')}" for name in vars(parse()) if name != "local_rank"]
    assert all(flag in text for flag in flags)
    assert all(number in text for number in ("16384", "0.00015", "0.55", "ViT-B-16-quickgelu"))


def test_digits_have_a_recipe_of_their_own_and_folders_called_alike_do_not():
    assert parse().student == "vit_digits_patch4_32" and parse("--data", "digits:7").epochs == 1
    assert parse("--data", "digits", "--teacher", "ViT-B-16").teacher_weights == "pretrained"
    assert parse("--data", "digits_photos").epochs == 200


BAD_INPUT = [
    (("--data", "/nowhere", "--epochs", "30"), "/nowhere"), (("--teacher", "nope"), "nope"),
    (("--student", "nope"), "nope"), (("--mask-ratio", "0.999"), "0.999"),
    (("--levels", "9"), "levels"),
    (("--teacher", "ViT-B-16", "--teacher-weights", "openai"), "quickgelu"),
    (("--teacher", "RN50", "--teacher-weights", "random"), "RN50"),
    (("--layer-decay", "1.5"), "--layer-decay"), (("--batch-size", "0"), "--batch-size"),
    (("--epochs", "inf"), "--epochs"), (("--warmup-epochs", "inf"), "--warmup-epochs"),
    (("--blr", "nan"), "--blr"), (("--min-lr", "-1"), "--min-lr"), (("--levels", "x"), "--levels"),
    (("--data", "digits:0"), "digits:0"), (("--data", "digits:x"), "digits:x"),
    (("--device", "gpu"), "gpu"), (("--drop-path", "1"), "--drop-path"),
    (("--mask", "none"), "--mask"), (("--task", "both"), "--task"), (("--nonsense",), "nonsense"),
    (("--image-size", "30"), "30"), (("--image-size", "0"), "0"),
    (("--image-size", "large"), "large"), (("--seed", "-1"), "--seed"),
    (("--init", ""), "--init"), (("--teacher-weights", ""), "--teacher-weights"),
    (("--out", ""), "--out"), (("--data", "digits:10000000000"), "digits:10000000000"),
    *((("--task", "probe", *more), "--micro-batch") for more in (
        ("--micro-batch", "1"), ("--batch-size", "1"), ("--batch-size", "13", "--micro-batch", "4"))),
    (("--init", "/nowhere.pt"), "/nowhere.pt"),
    *[pytest.param(("--device", name), name, marks=pytest.mark.skipif(there, reason="is there"))
      for name, there in (("cuda", torch.cuda.is_available()),
                          ("mps", torch.backends.mps.is_available()))]]


@pytest.mark.parametrize("argv, says", BAD_INPUT)
def test_bad_input_is_one_line(tmp_path, capsys, argv, says):
    assert says in refused(capsys, *digits(tmp_path / "out"), *argv)
    assert not (tmp_path / "out" / "last.pt").exists()


def test_only_the_digits_have_a_demo(tmp_path, painted, capsys, monkeypatch):
    shutil.copytree(painted, tmp_path / "digits_of_mine")
    monkeypatch.chdir(tmp_path)
    assert "vit_digits_patch4_32" in refused(
        capsys, *on_folder("digits_of_mine", tmp_path / "out", "--teacher-weights", "pretrained"))
    assert not (tmp_path / "out" / "teacher").exists()


def test_another_task_on_digits_is_no_demo(tmp_path):
    main("--data", "digits:64", "--task", "probe", "--device", "cpu", "--out", tmp_path)
    assert saved(tmp_path) == 1 and not (tmp_path / "teacher").exists()


def test_what_may_be_zero(capsys):
    zero = set()
    for key in [key for key, v in vars(parse()).items() if type(v) in (int, float)]:
        with contextlib.suppress(ma.UsageError, SystemExit):
            parse(f"--{key.replace('_', '-')}", 0)
            zero.add(key)
    assert zero == {"min_lr", "warmup_epochs", "weight_decay", "drop_path", "mask_ratio",
                    "workers", "seed"}


def test_warm_up_must_fit_into_the_epochs(tmp_path, capsys):
    for argv in (("--epochs", 10), ("--warmup-epochs", 201), ("--task", "probe", "--epochs", 5)):
        error = refused(capsys, "--data", tmp_path, *argv)
        assert "--epochs" in error and "--warmup-epochs" in error
    assert parse("--data", "x", "--epochs", 20).epochs == 20
    assert parse("--data", "digits", "--epochs", 0.05).epochs == 0.05  # its own warm-up is longer


def test_a_batch_is_divided_among_ranks_and_slurm_needs_torchrun():
    seven = run("--batch-size", 16, code=2, RANK=0, WORLD_SIZE=5)
    assert "16" in one_line(seven) and "5" in one_line(seven)
    assert "torchrun" in one_line(run(SLURM_NTASKS=2, code=2))


def test_the_old_launchers_flag_is_taken():
    assert parse("--local-rank=0", "--seed", 3).seed == 3


def test_workers_are_the_cpus_that_this_process_may_use():
    for ranks in (1, 2, 100):
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        done = run(script="print", first=f"""
import os, sys, train
print(train.parse(["--data", "x"]).workers)
os.cpu_count = None
sys.stdout.flush()
os._exit(0)""", LOCAL_WORLD_SIZE=ranks, WORLD_SIZE=1)
        assert int(done.out) == max(1, min(16, cpus // ranks))


def test_an_error_is_written_at_once():
    """Otherwise the words of two ranks mix where Python does not buffer (PYTHONUNBUFFERED)."""
    written = []
    with contextlib.redirect_stderr(SimpleNamespace(write=written.append)):
        with pytest.raises(SystemExit):
            main("--batch-size", 0)
    assert len(written) == 1 and written[0].endswith("\n") and "--batch-size" in written[0]


def test_a_slip_in_the_model_keeps_its_traceback_and_the_log_its_voice(tmp_path, painted):
    script = tmp_path / "script.py"
    script.write_text("""
import logging, sys, torch, train
def slip(module, arguments, output):
    if type(module).__name__ == "Block":
        logging.getLogger("mine").warning("a line of my own")
        a, b = [1, 2, 3]
torch.nn.modules.module.register_module_forward_hook(slip)
train.main()
""")
    done = run(*on_folder(painted, tmp_path), code=1, script=script)
    assert "Traceback" in done.err and "a, b = [1, 2, 3]" in done.err
    assert "ValueError: too many values to unpack" in done.err and "a line of my own" in done.err


def test_a_slip_with_files_keeps_its_traceback_too(tmp_path, painted, hooks):
    def slip(module, arguments):
        if type(module).__name__ == "Block":
            open(tmp_path / "nowhere")
    hooks.before_forward(slip)
    with pytest.raises(FileNotFoundError):
        main(*on_folder(painted, tmp_path / "out"))


def test_a_terminal_without_unicode_is_no_reason_to_stop(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "é")
    next((tmp_path / "é" / "train").rglob("*.JPEG")).write_bytes(b"no image")
    argv = on_folder(tmp_path / "é", tmp_path / "out é", "--task", "finetune", "--epochs", 1)
    done = run(*argv, PYTHONIOENCODING="ascii")
    assert done.out.isascii() and saved(tmp_path / "out é") == 3 and "no image" not in done.out
    names = (tmp_path / "out é" / "classes.txt").read_text(encoding="utf-8").split("\n")
    assert names[:3] == [f"class {label} é" for label in range(3)]


# --- Data ----------------------------------------------------------------------------------------

def test_digits_are_fixed_by_a_count_and_nothing_leaks():
    for data, count, fixed in (("digits", 76800, False), ("digits:50", 50, True)):
        found = train.open_data(parse("--data", data), (32, 32))
        assert [len(source) for source in found] == [count, 2000, 1000]
        images = [[source[[(epoch, i) for i in range(9)]][0] for epoch in (0, 1)]
                  for source in found]
        assert [torch.equal(*pair) for pair in images] == [fixed, True, True]
        first = [each for each, _ in images]
        assert not any(torch.equal(first[a], first[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        pictures, labels = found[0][[(0, i) for i in range(20)]]
        assert labels.tolist() == [*range(10), *range(10)]
        assert pictures.shape == (20, 3, 32, 32) and pictures.dtype == torch.uint8
        assert found[0].classes == list("0123456789")
        assert not torch.equal(images[0][0], train.open_data(
            parse("--data", data, "--seed", 1), (32, 32))[0][[(0, i) for i in range(9)]][0])


def test_digits_are_legible():
    """The nearest of ten mean images names 500 others better than chance, 0.1, by far."""
    bank, val = (source[[(0, i) for i in range(500)]][0].float().flatten(1)
                 for source in train.open_data(parse(), (32, 32))[1:])
    means = torch.stack([bank[digit::10].mean(0) for digit in range(10)])
    assert means.mean(1).argmin() == 1 and means.mean(1).argmax() in (0, 6, 8, 9)  # least ink, most
    assert len(bank.unique(dim=0)) == 500
    guess = torch.cdist(val - val.mean(1, True), means - means.mean(1, True)).argmin(1)
    assert (guess == torch.arange(500) % 10).float().mean() > 0.2


def touch(root, *names):
    for i, name in enumerate(names):
        paint(root / name, shade(i))


def files(source):
    """The numbers of a source's pictures, and their labels."""
    images, labels = source[[(0, i) for i in range(len(source))]]
    return dict(zip(which(images), labels.tolist(), strict=True))


def test_classes_are_the_folders_in_train(tmp_path):
    touch(tmp_path, "train/b/1.png", "train/a/2.png", "train/a/deeper/3.png", "train/4.png",
          "val/b/5.png", "val/6.png", "aside/c/7.png")
    (tmp_path / "train" / "a" / "text.txt").touch()
    (tmp_path / "train" / "empty").mkdir()
    data, bank, val = sources(tmp_path)
    assert data.classes == ["a", "b"] and files(bank) == {0: 1, 1: 0, 2: 0}
    assert sorted(which(data[[(0, i) for i in range(3)]][0])) == [0, 1, 2]
    assert files(val) == {4: 1}
    data, bank, val = sources(tmp_path / "train" / "a")  # no folder of classes: no labels
    assert data.classes == [] and val is None and set(files(bank)) == {1, 2}
    touch(tmp_path, "val/new/8.png")
    with pytest.raises(ma.UsageError, match="val"):
        sources(tmp_path)


def test_hidden_entries_and_what_a_mac_adds_are_no_data(tmp_path):
    touch(tmp_path, "train/a/0.png", "train/b/1.png", "train/.ipynb_checkpoints/2.png",
          "train/a/.ipynb_checkpoints/3.png", "train/__MACOSX/4.png", "train/a/__MACOSX/5.png",
          "__MACOSX/6.png", ".hidden/7.png", "train/a/.8.png")
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"no image")
    data, bank, _ = sources(tmp_path)
    assert data.classes == ["a", "b"] and set(files(bank)) == {0, 1}
    shutil.rmtree(tmp_path / "train" / "b")
    shutil.move(tmp_path / "train" / "a", tmp_path / "all")
    shutil.rmtree(tmp_path / "train")
    assert set(files(sources(tmp_path)[1])) == {0}


def test_val_without_classes_is_an_error_and_without_train_is_not_trained_on(tmp_path):
    touch(tmp_path, "train/0.png", "val/1.png")
    assert set(files(sources(tmp_path)[1])) == {0} and sources(tmp_path)[2] is None
    touch(tmp_path, "train/a/2.png", "train/b/3.png")
    for empty in ("1.png", "a/nothing.txt"):  # flat, as from Kaggle; and a class without images
        shutil.rmtree(tmp_path / "val")
        (tmp_path / "val" / empty).parent.mkdir(parents=True)
        (tmp_path / "val" / empty).touch()
        with pytest.raises(ma.UsageError, match="val"):
            sources(tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert sources(tmp_path)[2] is None


def test_numbers_of_images_and_classes_are_said(tmp_path, painted):
    out = run(*on_folder(painted, tmp_path, "--epochs", 1)).out
    assert "36 images" in out and "2 classes" in out and re.search(r"\b5\b", out)


def test_a_folder_too_deep_is_not_classified(tmp_path, capsys):
    touch(tmp_path, "data/train/animals/cat/1.png", "data/train/animals/dog/2.png")
    for task in ("finetune", "probe"):
        argv = on_folder(tmp_path / "data", tmp_path / "out", "--task", task, "--batch-size", 2)
        error = refused(capsys, *argv)
        assert "animals" in error or "one class" in error or "two" in error
        assert "train" in refused(capsys, *argv, "--data", tmp_path / "data/train/animals/cat")


def test_links_to_folders_and_files_are_followed(tmp_path):
    touch(tmp_path, "data/train/a/0.png", "data/train/b/1.png", "elsewhere/2.png")
    (tmp_path / "data" / "train" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "train" / "b" / "3.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    data, bank, _ = sources(tmp_path / "data")
    assert len(data) == 4 and files(bank) == {0: 0, 1: 1, 2: 1}


def test_all_ranks_have_the_folder_that_rank_0_sees(tmp_path):
    """Another has one image more, as on a network disk that lags behind."""
    for rank in range(2):
        touch(tmp_path / str(rank), *(f"data/{i:02}.png" for i in range(12 + rank)))
    argv = on_folder("data", tmp_path / "out", "--epochs", 2, "--eval-every", 100)
    world = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [Child(*argv, RANK=rank, LOCAL_RANK=rank, cwd=tmp_path / str(rank), **world)
             for rank in range(2)]
    assert "12 images" in [rank.wait(0) for rank in ranks][0].out
    run(*argv, "--out", tmp_path / "one", cwd=tmp_path / "0")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "one"), 2e-4)


def test_workers_do_not_copy_the_names(tmp_path):
    for i in range(3000):
        file = tmp_path / "train" / "ab"[i % 2] / f"{'long ' * 20}{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    data, bank, _ = sources(tmp_path)
    assert len(data) == 3000
    assert all(len(ForkingPickler.dumps(source)) < 30000 for source in (data, bank))


@pytest.fixture(scope="session")
def wild(tmp_path_factory, zoo, painted):
    """Two classes, of which one has all kinds of files."""
    root = tmp_path_factory.mktemp("wild")
    (root / "train").mkdir()
    (root / "train" / "a").symlink_to(zoo)
    (root / "train" / "b").symlink_to(painted / "train" / "b")
    return root


BROKEN = ("text.jpg", "zero.png", "truncated.jpg", "gone.jpg", "bomb.png")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """One image of each kind that is met in the wild: the left half is red, the right half blue; or
    white and black."""
    root = tmp_path_factory.mktemp("zoo")
    image = Image.new("RGB", (80, 40), (250, 10, 10))
    image.paste((10, 10, 250), (40, 0, 80, 40))
    image.save(root / "plain.jpg", quality=95)
    image.save(root / "png.JPEG", format="PNG")
    image.save(root / "UPPER.JPG", quality=95)
    image.save(root / "a.jfif", format="JPEG", quality=95)
    image.save(root / "a.webp", lossless=True)
    image.save(root / "a.jp2")
    image.save(root / "a.avif", quality=95)
    image.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    image.quantize(4).save(root / "palette.png")
    image.save(root / "animated.gif", save_all=True, append_images=[image.rotate(90)] * 2)
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer turns what is stored by 90° clockwise
    image.rotate(90, expand=True).save(root / "exif.jpg", quality=95, exif=turned)
    odd = b"Exif\0\0II*\0" + struct.pack(  # the same, and a resolution in letters
        "<IHHHIIHHI4sI", 8, 2, 0x0112, 3, 1, 6, 0x011A, 2, 3, b"72\0\0", 0)
    image.rotate(90, expand=True).save(root / "odd-exif.jpg", quality=95, exif=odd)
    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (40, 0, 80, 40))
    clear.save(root / "alpha.png")
    half = torch.ones(40, 80)
    half[:, 40:] = 0
    for name, white, kind in (("16.png", 65535, "int32"), ("16.tif", 65535, "int32"),
                              ("float.tif", 1, "float32"), ("resized.tif", 1.01, "float32"),
                              ("float255.tif", 255, "float32")):
        values = (half * white).numpy().astype(kind)
        Image.fromarray(values.astype("uint16") if kind == "int32" else values).save(root / name)
    big_endian = Image.fromarray((half * 65535).numpy().astype("uint16")).tobytes()
    Image.frombytes("I;16B", (80, 40), big_endian).save(root / "imagej.tif")
    grey = torch.tensor([[60000] * 40 + [20000] * 40] * 40, dtype=torch.int32).numpy()
    Image.fromarray(grey.astype("float32")).save(root / "wide.tif")
    Image.fromarray(grey.astype("uint16")).save(root / "grey16.png")
    (root / "text.jpg").write_text("no image")
    (root / "zero.png").touch()
    (root / "truncated.jpg").write_bytes((root / "plain.jpg").read_bytes()[:500])
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))
    (root / "x.jpg").mkdir()
    return root


RED, BLUE, WHITE, BLACK = (250, 10, 10), (10, 10, 250), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize("name, left, right", [
    *((name, RED, BLUE) for name in ("plain.jpg", "png.JPEG", "UPPER.JPG", "a.jfif", "a.webp",
                                     "a.jp2", "a.avif", "cmyk.jpg", "palette.png", "animated.gif",
                                     "exif.jpg", "odd-exif.jpg")),
    ("alpha.png", RED, WHITE), ("16.png", WHITE, BLACK), ("16.tif", WHITE, BLACK),
    *((name, WHITE, BLACK) for name in ("float.tif", "resized.tif", "float255.tif", "imagej.tif")),
    *((name, [233] * 3, [78] * 3) for name in ("grey16.png", "wide.tif"))])
def test_images_are_read_as_a_viewer_shows_them(zoo, tmp_path, name, left, right):
    shutil.copy(zoo / name, tmp_path)
    images, _ = sources(tmp_path)[1][[(0, 0)]]
    off = 0 if name.endswith((".png", ".tif")) else 6  # the others lose something
    for column, colour in ((3, left), (28, right)):
        assert (images[0, :, 16, column].int() - torch.tensor(colour)).abs().max() <= off


def test_broken_files_are_named_once_and_their_neighbours_stand_in(zoo, tmp_path):
    argv = (*on_folder(zoo, tmp_path / "out"), "--batch-size", 11)
    done = run(*argv)
    said = [line for line in done.err.splitlines() if "unreadable" in line]  # in four epochs
    assert sorted(name for line in said for name in BROKEN if name in line) == sorted(BROKEN)
    assert not any("x.jpg" in line for line in said)
    data = sources(zoo)[1]
    assert data[[(0, i) for i in range(23)]][0].float().std((1, 2, 3)).min() > 1  # none is blank


def test_more_broken_files_than_a_hundredth_and_ten_stop_the_run(zoo, tmp_path, capsys):
    for i in range(22):
        shutil.copy(zoo / ("plain.jpg" if i % 2 else "text.jpg"), tmp_path / f"{i}.jpg")
    argv = (*on_folder(tmp_path, tmp_path / "out"), "--batch-size", 11)
    assert "11 of 22" in refused(capsys, *argv)
    (tmp_path / "0.jpg").unlink()
    main(*argv, "--out", tmp_path / "fewer", "--epochs", 1, "--warmup-epochs", 0)
    for i in range(3):
        (tmp_path / "all" / f"{i}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "all" / f"{i}.jpg").write_bytes(b"no image")
    assert "3 of 3" in refused(capsys, *argv, "--data", tmp_path / "all", "--out", tmp_path / "3")


def test_no_picture_costs_much_more_than_its_own_pixels(tmp_path):
    Image.new("L", (20000, 1)).save(tmp_path / "line.png")
    Image.new("L", (1, 20000)).save(tmp_path / "column.png")
    done = run(script="-", first=f"""
import os, resource, sys, train
args = train.parse(["--data", {str(tmp_path)!r}])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for source in train.open_data(args, (224, 224))[:2]:
    images, _ = source[[(epoch, index) for epoch in range(3) for index in range(2)]]
    assert images.shape == (6, 3, 224, 224)
print(peak() - before, flush=True)
os._exit(0)""")
    assert int(done.out) < 50 and not done.err  # MiB


def ramps(file, size=(120, 90)):
    """A picture that tells where a crop of it comes from: red grows to the right, green down."""
    red = torch.linspace(0, 255, size[0]).expand(size[1], -1)
    green = torch.linspace(0, 255, size[1])[:, None].expand(-1, size[0])
    Image.fromarray(torch.stack([red, green, 0 * red], 2).round().byte().numpy()).save(file)


@pytest.mark.parametrize("task, smallest", [("pretrain", 0.2), ("finetune", 0.08),
                                            ("probe", 0.08)])
def test_crops_are_of_the_recipes_area_shape_and_side(tmp_path, task, smallest):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
    ramps(tmp_path / "train" / "a" / "0.png")
    paint(tmp_path / "train" / "b" / "1.png", shade(1))
    source = sources(tmp_path, "--task", task, size=(48, 48))[0]
    images = source[[(epoch, 0) for epoch in range(600)]][0].float()
    red, green = images[:, 0, 8:40, 8:40].mean(1), images[:, 1, 8:40, 8:40].mean(2)
    width, height = ((x[:, -1] - x[:, 0]) / 255 * 48 / 31 for x in (red, green))
    if task == "finetune":  # colours and geometry change too: what is left is as torchvision's
        torch.manual_seed(0)
        reference = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(
            48, (0.08, 1), interpolation=Image.BICUBIC), v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9), v2.RandomErasing(0.25)])
        with Image.open(tmp_path / "train" / "a" / "0.png") as image:
            theirs = torch.stack([reference(image) for _ in range(600)]).float()
        black = [(x.sum(1) == 0).float().mean((1, 2)) for x in (images, theirs)]
        blue = [x[:, 2].mean((1, 2)) for x in (images, theirs)]
        for ours, expected in zip(black + blue, black[::-1] + blue[::-1]):
            error = (ours.var() / 600 + expected.var() / 600).sqrt()
            assert (ours.mean() - expected.mean()).abs() < 4 * error + 1e-3
        some = [(x > 0.01).float().mean().item() for x in black]
        assert some[0] == pytest.approx(some[1], abs=0.09)
        return
    area, shape = width.abs() * height.abs(), width.abs() / height.abs() * 120 / 90
    assert area.min() == pytest.approx(smallest, abs=0.04) and area.max() > 0.85
    assert 0.7 < shape.min() < 0.8 and 1.25 < shape.max() < 1.45
    assert 0.43 < (width < 0).float().mean() < 0.57 and (height > 0).all()


def test_an_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    data, other = sources(folder, "--seed", 1)[0], sources(folder, "--seed", 2)[0]
    alone = {key: data[[key]][0][0] for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    torch.manual_seed(5)
    images = data[[*alone][::-1]][0]
    assert all(map(torch.equal, images, [*alone.values()][::-1]))
    assert not torch.equal(alone[0, 0], alone[1, 0]) and not torch.equal(
        alone[0, 0], other[[(0, 0)]][0][0])
    for source in sources(folder)[1:]:  # bank and val are not augmented
        assert torch.equal(source[[(0, 3)]][0], source[[(1, 3)]][0])


def test_evaluation_sees_the_centre(tmp_path):
    """Of the shorter side 224/256, whatever the shape."""
    for size in ((120, 90), (90, 120), (100, 100)):
        ramps(tmp_path / "0.png", size)
        image = sources(tmp_path, size=(56, 56))[1][[(0, 0)]][0][0].float()
        red, green = image[0].mean(0), image[1].mean(1)
        for ramp, side in ((red, size[0]), (green, size[1])):
            share = (ramp[50] - ramp[5]) / 255 * 56 / 45 * side / min(size)
            assert share.item() == pytest.approx(0.875, abs=0.02)
            assert ((ramp[0] + ramp[-1]) / 2).item() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("side, decoded", [(1000, 4), (500, 2), (200, 1), (40, 1)])
def test_large_jpegs_are_not_decoded_whole(tmp_path, side, decoded):
    """What is seen is what Pillow makes of a draft at least four times as large."""
    across = torch.linspace(0, 6, side)
    waves = torch.stack([(across * k).sin()[:, None] + (across * k).cos() for k in (1, 2, 3)], 2)
    Image.fromarray(((waves + 2) / 4 * 255).byte().numpy()).save(tmp_path / "a.jpg", quality=95)
    loads, real = [], Image.Image.load
    found = sources(tmp_path, size=(56, 56))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.JpegImagePlugin.JpegImageFile, "load", lambda self: (
            loads.append(self.size), PIL.ImageFile.ImageFile.load(self))[1])
        for source in found[:2]:
            source[[(0, 0)]]
    assert set(loads) == {(side // decoded, side // decoded)} and real


# --- Schedule ------------------------------------------------------------------------------------

@pytest.mark.parametrize("epochs, warmup, floor", [(4, 1, 1e-5), (4, 0, 0), (2, 2, 1e-6),
                                                   (3.6, 1.4, 1e-7)])
def test_rates_are_a_line_and_a_cosine(tmp_path, painted, hooks, epochs, warmup, floor):
    """In the optimiser and in the log; peak and floor are reached exactly."""
    seen = []
    hooks.before_step(lambda optimiser, *_: seen.append(optimiser.param_groups[0]["lr"]))
    main(*on_folder(painted, tmp_path, "--epochs", epochs, "--warmup-epochs", warmup, "--min-lr",
                    floor, "--blr", 0.01, "--save-every", 1, "--eval-every", 100))
    peak, steps, warm = 0.01 * 12 / 256, int(epochs * 3), int(warmup * 3)
    turns = [math.pi * (step + 1 - warm) / max(1, steps - warm) for step in range(steps)]
    rates = [peak * (step + 1) / warm if step < warm else
             floor + (peak - floor) * (1 + math.cos(turns[step])) / 2 for step in range(steps)]
    assert seen == pytest.approx(rates, rel=1e-9) and logged(tmp_path, "lr") == seen
    assert logged(tmp_path) == [*range(1, steps + 1)]
    assert logged(tmp_path, "epoch") == pytest.approx([(step + 1) / 3 for step in range(steps)])


def images_seen(hooks):
    """A list that fills with the numbers of the pictures of each forward pass."""
    seen = []

    def note(module, arguments):
        if type(module).__name__ == "MaskAlign":
            seen.append(which(arguments[0]))
    hooks.before_forward(note)
    return seen


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(tmp_path, painted, hooks):
    orders = []
    for seed in (1, 2):
        seen = images_seen(hooks)
        main(*on_folder(painted, tmp_path / str(seed), "--seed", seed, "--batch-size", 8,
                        "--eval-every", 100))
        images = sum(seen, [])  # 18 steps of 8: 4 epochs of 36
        assert [len(part) for part in seen] == [8] * 18
        orders += [tuple(images[at:at + 36]) for at in range(0, 144, 36)]
    assert all(sorted(order) == [*range(36)] for order in orders)
    assert len({*orders, tuple(range(36))}) == 9


@pytest.mark.parametrize("batch, most, parts", [
    (23, 16, [12, 11]), (12, 12, [12]), (12, 5, [4, 4, 4]), (10, 4, [4, 4, 2]), (7, 1, [1] * 7)])
def test_a_batch_is_split_as_evenly_as_can_be(tmp_path, painted, hooks, batch, most, parts):
    seen = images_seen(hooks)
    main(*on_folder(painted, tmp_path, "--batch-size", batch, "--micro-batch", most,
                    "--epochs", 1.1 * batch / 36, "--warmup-epochs", 0))
    sizes = [len(part) for part in seen]
    assert sorted(sizes, reverse=True) == parts and len(set(sum(seen, []))) == batch


def gradients(hooks, *argv):
    """Each step's gradients, flat, as the optimiser sees them."""
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimiser, *_: seen.append(torch.cat([
            p.grad.flatten() for group in optimiser.param_groups for p in group["params"]])))
    main(*argv)
    handle.remove()
    return seen


@pytest.mark.parametrize("more", [("--micro-batch", 16), ("--micro-batch", 4), ("--amp", "fp16"),
                                  ("--amp", "bf16")])
def test_the_gradient_is_that_of_the_batch_at_any_micro_batch_and_precision(
        tmp_path, folder, hooks, more):
    argv = on_folder(folder, tmp_path / "one", "--batch-size", 23, "--drop-path", 0.3, "--mask",
                     "random", "--epochs", 1.3, "--eval-every", 100)
    one = gradients(hooks, *argv, "--micro-batch", 23)
    other = gradients(hooks, *argv, "--out", tmp_path / "other", *more)
    assert len(one) == len(other) == 2
    close = 1e-5 if "--micro-batch" in more else 0.05
    assert (one[0] - other[0]).norm() < close * one[0].norm()
    if "--micro-batch" in more:
        assert logged(tmp_path / "one", "loss") == pytest.approx(
            logged(tmp_path / "other", "loss"), rel=1e-3)


def test_a_classifiers_drop_path_is_that_of_the_batch_at_any_micro_batch(tmp_path, hooks):
    """Digits are not mixed; and who else draws from torch's generator changes nothing."""
    def draw(module, arguments):
        if type(module).__name__ == "Classifier":
            torch.rand(5)
    hooks.before_forward(draw)
    one, other = (gradients(hooks, *digits(tmp_path / str(most), "--task", "finetune", "--epochs",
                                           0.3, "--drop-path", 0.5, "--micro-batch", most))
                  for most in (24, 6))
    assert (one[0] - other[0]).norm() < 1e-4 * one[0].norm()


# --- Model and optimiser -------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_the_optimiser_gets_the_recipe(tmp_path, painted, hooks, task):
    """Each trainable parameter once, with the decay, rate and momentum of its kind and depth."""
    seen, trained = [], {}
    hooks.before_step(lambda optimiser, *_: seen.append([*optimiser.param_groups]))
    run = train.train(parse(*on_folder(
        painted, tmp_path, "--task", task, "--layer-decay", 0.5, "--weight-decay", 0.3,
        "--blr", 0.1, "--min-lr", 0.1 * 12 / 256, "--warmup-epochs", 0, "--epochs", 0.4)))
    for group in seen[0]:
        for parameter in group["params"]:
            assert id(parameter) not in trained
            trained[id(parameter)] = group
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert {id(p) for p in named.values()} == trained.keys()
    if task == "probe":
        assert all(name.startswith("head.") for name in named)
    for name, parameter in named.items():
        group = trained[id(parameter)]
        exempt = ["align.matrix"] if task == "pretrain" else ["student.pos_embed",
                                                              "student.cls_token"]
        assert group["weight_decay"] == (0 if parameter.ndim == 1 or name in exempt else 0.3)
        part, inner, *rest = name.split(".")
        depth = 0 if part != "student" else 4 - int(rest[0]) if inner == "blocks" else 5
        assert group["lr"] == pytest.approx(0.1 * 12 / 256 * 0.5 ** depth)
        assert parameter.grad is None  # let go of after the step
    assert {group.get("momentum", group.get("betas")) for group in seen[0]} == {
        dict(pretrain=(0.9, 0.95), finetune=(0.9, 0.999), probe=0.9)[task]}


def test_all_of_an_encoder_is_fine_tuned_and_a_probe_leaves_it_as_it_was(tmp_path, painted):
    init = tmp_path / "init.pt"
    torch.manual_seed(7)
    torch.save(ma.vit("vit_digits_patch4_32").state_dict(), init)
    for task in ("finetune", "probe"):
        main(*on_folder(painted, tmp_path / task, "--task", task, "--init", init, "--epochs", 1))
    assert same(weights(tmp_path / "probe"), torch.load(init))
    before, after = torch.load(init), weights(tmp_path / "finetune")
    still = {name.partition(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert still <= {"norm", "pos_embed"}  # timm's, which nothing reads; fixed sines
    heads = [last(tmp_path / task)["head"] for task in ("finetune", "probe")]
    assert all(head["weight"].abs().max() > 0 and head["bias"].abs().max() > 0 for head in heads)


def test_a_classifier_reads_the_mean_patch_token_normed():
    student, images = ma.vit("vit_digits_patch4_32"), torch.rand(6, 3, 32, 32)
    tokens = student(images)[-1][:, 1:].mean(dim=1)
    for probe in (False, True):
        model = train.Classifier(student, 5, probe)
        if probe:  # of a batch in training, of all that was seen in evaluation
            normed = (tokens - tokens.mean(0)) / (tokens.var(0, unbiased=False) + 1e-5).sqrt()
        else:
            normed = (tokens - tokens.mean(1, True)) / (
                tokens.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(model(images), model.head(normed), atol=1e-4)
        assert 0.005 < model.head.weight.std() < 0.02


def test_flags_reach_model_and_teacher(tmp_path, painted):
    run = train.train(parse(*on_folder(
        painted, tmp_path, "--drop-path", 0.3, "--mask", "random", "--mask-ratio", 0.4,
        "--levels", 2, "--epochs", 0.4, "--warmup-epochs", 0)))
    assert run.model.student.drop_rates[-1] == pytest.approx(0.3) and run.teacher.levels == 2
    assert (run.model.mask, run.model.mask_ratio) == ("random", 0.4)
    assert not run.teacher.training and run.record["step"] == 1


@pytest.mark.parametrize("text, size", [("48", (48, 48)), ("32x48", (32, 48))])
def test_the_image_size_is_the_students(tmp_path, painted, hooks, text, size):
    shapes = set()
    hooks.before_forward(lambda module, arguments: shapes.add(tuple(arguments[0].shape[-2:]))
                         if type(module).__name__ == "Classifier" else None)
    init = tmp_path / "init.pt"  # of 32x32, whose positions are resampled
    torch.save(ma.vit("vit_digits_patch4_32").state_dict(), init)
    main(*on_folder(painted, tmp_path / "out", "--task", "finetune", "--image-size", text,
                    "--init", init, "--epochs", 0.4, "--warmup-epochs", 0))
    assert shapes == {size}
    patches = (size[0] // 4) * (size[1] // 4)
    assert weights(tmp_path / "out")["pos_embed"].shape == (1, 1 + patches, 64)


def test_only_fine_tuning_mixes_images_smooths_labels(tmp_path, painted):
    """Mixed labels sum to 1 and differ from step to step; a probe's are numbers."""
    for task, smoothing in (("finetune", 0.1), ("probe", 0)):
        with Calls(torch.nn.functional.cross_entropy) as calls:
            main(*on_folder(painted, tmp_path / task, "--task", task))
        labels = [arguments[1] for arguments, _ in calls.seen]
        assert len(labels) == 12
        assert {options.get("label_smoothing", 0) for _, options in calls.seen} == {smoothing}
        if task == "probe":
            assert {label.dtype for label in labels} == {torch.int64}
        else:
            assert all(torch.allclose(label.sum(1), torch.ones(12)) for label in labels)
            shares = {round(label[label > 0.5].min().item(), 4) for label in labels}
            assert len(shares) > 4 and any(share < 0.99 for share in shares)


def test_mixing_is_of_mixup_and_cutmix(painted):
    """Of black and white, one makes grey and the other a box; labels have the images' shares."""
    args = parse("--data", painted, "--task", "finetune")
    mix = train.mixing(sources(painted, "--task", "finetune")[0], args)
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    torch.manual_seed(0)
    grey, share = [], []
    for _ in range(1000):
        mixed, labels = mix(images, torch.tensor([0, 1]))
        assert labels[:, 1].tolist() == pytest.approx(mixed.mean((1, 2, 3)).tolist(), abs=1e-4)
        grey.append(mixed.unique().tolist() not in ([0, 1], [0], [1]))
        share.append(labels[0, 0].item())
    far = (torch.tensor(share) - 0.5).abs()  # of Beta(0.8, 0.8) and, nearly, Beta(1, 1)
    grey = torch.tensor(grey)
    assert 0.45 < grey.float().mean() < 0.55
    beta = torch.distributions.Beta(0.8, 0.8).sample((10000,))
    assert far[grey].mean().item() == pytest.approx((beta - 0.5).abs().mean().item(), abs=0.02)
    assert 0.2 < far[~grey].mean() < 0.3


def test_mixing_reaches_the_images(tmp_path, hooks):
    """No augmentation changes black; an image of half a black one's label is no longer black."""
    for i in range(24):
        paint(tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png", (255 * (i % 2),) * 3)
    images = []
    hooks.before_forward(lambda module, arguments: images.append(arguments[0])
                         if type(module).__name__ == "Classifier" else None)
    with Calls(torch.nn.functional.cross_entropy) as calls:
        main(*on_folder(tmp_path / "data", tmp_path / "out", "--task", "finetune", "--epochs", 8))
    labels = torch.cat([arguments[1] for arguments, _ in calls.seen])
    images = torch.cat(images)
    mixed = (labels[:, 0] > 0.3) & (labels[:, 0] < 0.7)
    black = images.flatten(1).amax(1) == 0
    assert images.max() <= 1 and black[labels[:, 0] > 0.999].all()
    assert mixed.sum() > 20 and black[mixed].float().mean() < 0.25


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_evaluation_has_the_precision_of_training(tmp_path, painted, hooks, task):
    seen = set()
    hooks.before_forward(lambda module, arguments: seen.add(
        (module.training, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        if type(module).__name__ == "ViT" and module.cls_token.requires_grad else None)
    main(*on_folder(painted, tmp_path, "--task", task, "--amp", "bf16", "--epochs", 1))
    assert seen == {(True, True, torch.bfloat16), (False, True, torch.bfloat16)}


# --- Evaluation ----------------------------------------------------------------------------------

def test_knn_is_the_vote_by_loops():
    def encoder(images):  # the first channel is the [CLS] token, the others are two patches
        x = images.float().flatten(2)
        x[:, 0] = 3 * (255 - x[:, 1])
        return [x.sqrt(), x]
    bank, val = (train.Digits(count, (32, 32), count, True) for count in (200, 300))
    features = []
    for source in (bank, val):
        x = source[[(0, i) for i in range(len(source))]][0].float().flatten(2)
        x = x[:, 1:].mean(dim=1)
        x = (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        features.append(x / x.norm(dim=1, keepdim=True))
    right = 0
    for i, row in enumerate((features[1] @ features[0].T).tolist()):
        votes = [0] * 10
        for j in sorted(range(200), key=lambda j: -row[j])[:20]:
            votes[j % 10] += math.exp(row[j] / 0.07)
        right += votes.index(max(votes)) == i % 10
    found = train.knn(encoder, bank, val, parse("--workers", 0, "--device", "cpu"))
    assert found == pytest.approx(100 * right / 300)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_knn_compares_and_votes_in_fp32_at_any_precision(tmp_path, painted, amp):
    """In fp16 e^(1 / 0.07) would be infinite."""
    with Calls(torch.Tensor.topk) as nearest, Calls(torch.Tensor.exp) as votes:
        main(*on_folder(painted, tmp_path, "--amp", amp, "--epochs", 1))
    assert {arguments[0].dtype for calls in (nearest, votes)
            for arguments, _ in calls.seen} == {torch.float32}


KNN = """
import json, math, os, torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
import train
if "RANK" in os.environ:
    dist.init_process_group("gloo")
largest = 0
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        global largest
        result = function(*arguments, **options or {})
        for x in [result] if torch.is_tensor(result) else []:
            largest = max(largest, x.untyped_storage().nbytes())
        return result
project = torch.randn(96, 2000, generator=torch.Generator().manual_seed(0))
def encoder(images):  # two patches, whose mean is 2000 features
    return [(images.float().flatten(1)[:, :96] @ project)[:, None].expand(-1, 3, -1)]
args = train.parse(["--micro-batch", "3", "--batch-size", "6", "--device", "cpu"])
for banked, asked in json.loads(os.environ["COUNTS"]):
    bank, val = train.Digits(banked, (16, 16), 1, True), train.Digits(asked, (16, 16), 2, True)
    largest = 0
    with Watch():
        right = train.knn(encoder, bank, val, args)
    print("found", right, largest / (banked * 2000 * 4))
"""


def test_ranks_share_knn_and_none_holds_the_whole_bank(tmp_path):
    """Also with fewer images than ranks, and fewer than neighbours."""
    (tmp_path / "knn.py").write_text(KNN)
    counts = dict(COUNTS=json.dumps([(200, 31), (2, 2), (1, 1), (7, 40), (50, 4), (50, 5),
                                     (50, 7), (50, 8), (50, 10)]),
                  script=tmp_path / "knn.py")
    done = [run(**counts), *run_ranks(ranks=3, **counts), *run_ranks(ranks=2, **counts)]
    found = [[line.split()[1:] for line in each.out.splitlines() if line.startswith("found")]
             for each in done]
    accuracies = [[float(right) for right, _ in each] for each in found]
    assert len(accuracies[0]) == 9 and 10 < accuracies[0][0] < 100
    assert all(each == pytest.approx(accuracies[0]) for each in accuracies)
    assert all(float(each[0][1]) < 0.6 for each in found[1:])  # of the bank's features


def test_a_classifier_is_timms_and_its_score_is_that_of_the_images(tmp_path, painted):
    """classifier.pt loads strictly; its logits are the model's, its top-1 is the log's."""
    run = train.train(parse(*on_folder(painted, tmp_path, "--task", "finetune", "--blr", 0.01)))
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=2, global_pool="avg", img_size=32, patch_size=4,
        embed_dim=64, depth=4, num_heads=4).eval()
    network.load_state_dict(torch.load(tmp_path / "classifier.pt"))
    assert run.model.fc_norm.eps == network.fc_norm.eps
    images, labels = run.val[[(0, i) for i in range(5)]]
    with torch.no_grad():
        logits = network(ma.normalise(images, *ma.IMAGENET_MEAN_STD))
        assert torch.allclose(logits, run.model.eval()(images), atol=1e-5)
    right = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert run.record["top1"] == pytest.approx(right) and run.record["top5"] == 100
    assert (tmp_path / "classes.txt").read_text().split() == ["a", "b"]
    assert last(tmp_path)["classes"] == ["a", "b"]


def test_top5_counts_the_five_best(tmp_path):
    for i in range(36):
        paint(tmp_path / "data" / "train" / f"{i % 9}" / f"{i}.png", shade(i))
        paint(tmp_path / "data" / "val" / f"{i % 9}" / f"{i}.png", shade(i))
    run = train.train(parse(*on_folder(tmp_path / "data", tmp_path / "out", "--task", "probe")))
    images, labels = run.val[[(0, i) for i in range(36)]]
    with torch.no_grad():
        ranking = run.model.eval()(images).argsort(dim=1, descending=True)
    hits = (ranking == labels[:, None]).float().mean(0).cumsum(0)
    assert run.record["top1"] == pytest.approx(100 * hits[0].item(), abs=0.01)
    assert run.record["top5"] == pytest.approx(100 * hits[4].item(), abs=0.01) and hits[4] < 1


def test_ranks_share_a_classifiers_evaluation(tmp_path, painted):
    """5 images on three ranks: each counts once."""
    argv = on_folder(painted, tmp_path / "1", "--task", "probe", "--amp", "off", "--seed", 3,
                     "--blr", 1e-9, "--min-lr", 0)
    one, three = Child(*argv), start_ranks(*argv, "--out", tmp_path / "3", ranks=3)
    for child in (one, *three):
        child.wait(0)
    assert logged(tmp_path / "1", "top1") == logged(tmp_path / "3", "top1") != [None, None]


@pytest.mark.parametrize("every, saves, steps", [
    (2, 1, [6, 12]), (2, 4, [8, 12]), (0.5, 1, [2, 3, 5, 6, 8, 9, 11, 12]), (100, 1, [12])])
def test_evaluation_comes_every_so_many_epochs(tmp_path, painted, hooks, every, saves, steps):
    """Of 3 steps, at the next line of the log, and at the end; training goes on in training mode,
    and the evaluated network is in the other."""
    trained, evaluated = [], []

    def note(module, arguments):
        if type(module).__name__ == "MaskAlign":
            trained.append(module.training)
        if type(module).__name__ == "ViT" and module.cls_token.requires_grad:
            evaluated.append(module.training)
    hooks.before_forward(note)
    main(*on_folder(painted, tmp_path, "--eval-every", every, "--save-every", saves))
    records = zip(logged(tmp_path), logged(tmp_path, "knn"))
    assert [step for step, knn in records if knn is not None] == steps
    assert trained == [True] * 12 and evaluated.count(True) == 12
    assert evaluated.count(False) == 2 * len(steps)  # bank and val


# --- Checkpoints ---------------------------------------------------------------------------------

def test_student_file_loads_strictly_into_timm(tmp_path, painted):
    run = train.train(parse(*on_folder(painted, tmp_path, "--epochs", 1)))
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=4,
                                embed_dim=64, depth=4, num_heads=4).eval()
    network.load_state_dict(weights(tmp_path))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = run.model.student.eval()
        expected = network.forward_features(ma.normalise(images, *ma.IMAGENET_MEAN_STD))
        assert torch.allclose(ours.norm(ours(images)[-1]), expected, atol=1e-5)
    assert sorted(last(tmp_path)) == sorted(
        ["student", "align", "optimiser", "scaler", "step", "log", "arguments", "classes"])
    assert not (tmp_path / "classifier.pt").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, folder, task):
    """Bit for bit: weights, optimiser, log; killed after step 7, saved at 5, in mid-epoch."""
    argv = on_folder(folder, tmp_path / "whole", "--task", task, "--save-every", 5, "--drop-path",
                     0.3, "--micro-batch", 5)
    whole, killed = Child(*argv), Child(*argv, "--out", tmp_path / "cut", first=signalled(7))
    whole.wait(0), killed.wait(-9)
    assert saved(tmp_path / "cut") == 5 and logged(tmp_path / "cut") == [5]
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:  # as killed before the checkpoint
        file.write('{"step": 175, "loss": 0}\n{"step": 18')
    assert "from 5" in run(*argv, "--out", tmp_path / "cut").out
    assert equal(state(tmp_path / "whole"), state(tmp_path / "cut"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert logged(tmp_path / "cut") == [5, 10, 12] and state(tmp_path / "cut")["step"] == 12
    done = run(*argv, "--out", tmp_path / "cut")
    assert "finished" in done.out and logged(tmp_path / "cut") == [5, 10, 12]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, folder):
    """What two processes end with that nothing disturbs, and their command."""
    out = tmp_path_factory.mktemp("two")
    run_ranks(*for_two(folder, out))
    return out, for_two(folder, out)


def test_world_size_changes_nothing(tmp_path, folder, two_ranks):
    """One process, or three, with and without accumulation, end as two do."""
    out, argv = two_ranks
    children = [Child(*argv, "--out", tmp_path / "1", "--micro-batch", 12),
                *start_ranks(*argv, "--out", tmp_path / "3", ranks=3)]
    for child in children:
        child.wait(0)
    for other in ("1", "3"):
        assert same(weights(out), weights(tmp_path / other), 2e-4)
        for key in ("step", "epoch", "loss", "lr", "grad_norm"):
            assert logged(out, key) == pytest.approx(logged(tmp_path / other, key), rel=1e-3)
        assert logged(out, "knn")[-1] == pytest.approx(logged(tmp_path / other, "knn")[-1], abs=9)


def test_two_killed_ranks_go_on_as_any_number_and_lose_nothing(tmp_path, two_ranks):
    out, argv = two_ranks
    for rank in start_ranks(*argv, "--out", tmp_path / "2", first=signalled(7)):
        rank.wait(-9)
    assert saved(tmp_path / "2") == 5
    shutil.copytree(tmp_path / "2", tmp_path / "1")
    children = [Child(*argv, "--out", tmp_path / "1"),
                *start_ranks(*argv, "--out", tmp_path / "2")]
    for child in children:
        child.wait(0)
    assert equal(state(out), state(tmp_path / "2"))
    assert same(weights(out), weights(tmp_path / "1"), 2e-4)


def test_init_is_read_and_told_of_at_a_runs_beginning_only(tmp_path, folder):
    init = tmp_path / "init.pt"
    torch.manual_seed(7)
    torch.save(ma.vit("vit_digits_patch4_32").state_dict(), init)
    argv = on_folder(folder, tmp_path / "out", "--task", "probe", "--init", init, "--epochs", 2)
    whole = run_ranks(*argv, "--out", tmp_path / "whole")
    assert sum(rank.out.count("init.pt") for rank in whole) == 1
    for rank in start_ranks(*argv, "--save-every", 3, first=signalled(4)):
        rank.wait(-9)
    init.unlink()
    assert not any("init.pt" in rank.out for rank in run_ranks(*argv))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_checkpoint_is_a_beginning_for_another_run(tmp_path, folder):
    argv = on_folder(folder, tmp_path / "old", "--blr", 0.1, "--epochs", 1, "--warmup-epochs", 0)
    main(*argv)
    for name in ("last.pt", "student.pt"):
        begun = train.train(parse(*argv, "--out", tmp_path / name, "--init",
                                  tmp_path / "old" / name, "--blr", 1e-12, "--min-lr", 0))
        assert same(last(tmp_path / "old")["student"], begun.model.student.state_dict(), 1e-6)


def test_other_arguments_are_refused_and_named(tmp_path, folder, capsys):
    argv = on_folder(folder, tmp_path / "out", "--epochs", 1, "--warmup-epochs", 0.4)
    main(*argv)
    torch.save({}, tmp_path / "x.pt")
    for flag, value, now in (
            ("--seed", 1, 0), ("--levels", 2, 3), ("--mask", "random", "attentive"),
            ("--mask-ratio", 0.6, 0.7), ("--batch-size", 6, 12), ("--blr", 1, 0.00015),
            ("--min-lr", 1, 1e-5), ("--warmup-epochs", 0, 0.4), ("--weight-decay", 0, 0.05),
            ("--drop-path", 0, 0.1), ("--layer-decay", 0.5, 1), ("--init", "x.pt", None),
            ("--amp", "bf16", "off"), ("--task", "probe", "pretrain"), ("--epochs", 0.5, 1)):
        error = refused(capsys, *argv, flag, value)
        assert flag[2:].replace("-", "_") in error.replace("-", "_") and "last.pt" in error
        assert str(value) in error and str(now) in error and "--init" in error


def test_what_is_no_part_of_the_result_may_change(tmp_path, painted, capsys):
    argv = on_folder(painted, tmp_path / "out", "--epochs", 1)
    main(*argv)
    capsys.readouterr()
    main(*argv, "--micro-batch", 5, "--save-every", 7, "--eval-every", 9, "--no-compile", "--amp",
         "off")
    assert "finished" in capsys.readouterr().out
    shutil.move(tmp_path / "out", tmp_path / "moved")
    main(*argv, "--out", tmp_path / "moved")
    assert "finished" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer(tmp_path, painted, capsys):
    argv = on_folder(painted, tmp_path, "--epochs", 2)
    main(*argv)
    capsys.readouterr()
    main(*argv, "--epochs", 4)
    assert "from 6" in capsys.readouterr().out and saved(tmp_path) == 12
    assert logged(tmp_path)[-1] == 12 and logged(tmp_path, "lr")[-1] == pytest.approx(1e-5)


def test_a_folder_that_has_changed_is_said_to_have(tmp_path, painted, capsys):
    shutil.copytree(painted, tmp_path / "data")
    argv = on_folder(tmp_path / "data", tmp_path / "out", "--epochs", 1)
    main(*argv)
    paint(tmp_path / "data" / "train" / "a" / "new.png", shade(3))
    error = refused(capsys, *argv)
    assert "--data" in error and "36" in error and "37" in error


def test_damaged_checkpoints_are_one_line(tmp_path, painted, capsys):
    argv = on_folder(painted, tmp_path / "out", "--epochs", 1)
    main(*argv)
    path = tmp_path / "out" / "last.pt"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    evil = tmp_path / "evil.pt"
    torch.save({"student": Evil()}, evil)
    for damaged in (good[:5000], bytes(flipped), b"", evil.read_bytes()):
        path.write_bytes(damaged)
        assert "last.pt" in refused(capsys, *argv)
    assert not Path("evil-was-here").exists()
    torch.save({"model": {}}, path)  # of another program
    assert "last.pt" in refused(capsys, *argv)
    path.unlink()
    assert "log.jsonl" in refused(capsys, *argv)


class Evil:
    def __reduce__(self):
        return (Path("evil-was-here").touch, ())


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of file sizes")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, folder):
    """From which the run goes on, once there is room."""
    argv = on_folder(folder, tmp_path / "out", "--save-every", 5)
    Child(*argv, first=signalled(7)).wait(-9)
    good = (tmp_path / "out" / "last.pt").read_bytes()
    full = one_line(run(*argv, largest_file=len(good) - 1000, code=2))
    assert "last.pt" in full and (tmp_path / "out" / "last.pt").read_bytes() == good
    assert "log.jsonl" not in full
    run(*argv, "--out", tmp_path / "whole")
    run(*argv)
    assert equal(state(tmp_path / "whole"), state(tmp_path / "out"))
    new = run(*argv, "--out", tmp_path / "new", largest_file=1000, code=2)  # not even a beginning
    assert ".pt" in one_line(new) and not (tmp_path / "new" / "last.pt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_disk_that_is_too_full_for_the_log_is_one_line(tmp_path, painted, capsys):
    argv = on_folder(painted, tmp_path, "--epochs", 1)
    main(*argv)
    good = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    assert str(tmp_path) in refused(capsys, *argv, "--epochs", 2)
    assert (tmp_path / "last.pt").read_bytes() == good


def test_an_out_that_cannot_be_or_goes_away_is_one_line(tmp_path, painted, capsys, hooks):
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in refused(capsys, *on_folder(painted, tmp_path / "file" / "out"))
    taken = []
    hooks.after_step(lambda *_: (taken.append(1), shutil.rmtree(tmp_path / "out"))
                     if not taken else None)
    assert f"{tmp_path}/out" in refused(capsys, *on_folder(painted, tmp_path / "out"))


def test_two_runs_in_one_folder(tmp_path, painted):
    """The second is refused, with the first one's number; a lock ends with its process."""
    argv = on_folder(painted, tmp_path)
    first = Child(*argv, "--save-every", 2, first=signalled(3, "SIGSTOP"))
    reach(first, tmp_path, 2)
    assert str(first.pid) in one_line(run(*argv, code=2))
    first.kill()
    first.wait(-9)
    run(*argv)
    assert saved(tmp_path) == 12


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, painted, monkeypatch):
    def acquire(lock, **options):
        raise NotImplementedError("flock")
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    main(*on_folder(painted, tmp_path, "--epochs", 1))
    assert saved(tmp_path) == 3


# --- The loop ------------------------------------------------------------------------------------

def test_an_obvious_loop_has_the_same_losses(tmp_path, folder, hooks):
    """One image at a time, one optimiser, the paper's formulas; the images, which patches of them
    are visible, and the first weights are the run's."""
    torch.manual_seed(1)
    torch.save(ma.vit("vit_digits_patch4_32").state_dict(), tmp_path / "teacher.pt")
    steps, first = [], {}

    def watch(module, arguments):
        if type(module).__name__ == "MaskAlign":
            if not first:
                first.update({name: x.clone() for name, x in module.state_dict().items()})
                module.student.register_forward_pre_hook(keep_of, with_kwargs=True)
            steps.append([arguments[0], None])

    def keep_of(student, arguments, options):
        if student.training:
            call = inspect.signature(student.forward).bind(*arguments, **options)
            steps[-1][1] = call.arguments["keep"]
    hooks.before_forward(watch)
    main(*on_folder(folder, tmp_path / "out"), "--epochs", 2, "--warmup-epochs", 0.7,
         "--micro-batch", 4, "--drop-path", 0, "--weight-decay", 0.3, "--blr", 0.01,
         "--min-lr", 1e-5, "--save-every", 1,
         "--teacher-weights", tmp_path / "teacher.pt")

    teacher = ma.load_teacher("vit_digits_patch4_32", tmp_path / "teacher.pt", 3)
    model = ma.MaskAlign(ma.vit("vit_digits_patch4_32"), teacher)
    model.load_state_dict(first)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = {name for name, p in parameters.items() if p.ndim > 1} - {"align.matrix"}
    optimiser = torch.optim.AdamW([
        dict(params=[parameters[name] for name in decayed], weight_decay=0.3),
        dict(params=[parameters[name] for name in parameters.keys() - decayed], weight_decay=0)],
        betas=(0.9, 0.95))
    peak, losses = 0.01 * 12 / 256, []
    for step in range(6):
        optimiser.zero_grad()
        total = 0
        for images, keep in steps[3 * step:3 * step + 3]:
            for image, kept in zip(images, keep):
                levels, _ = teacher(image[None])
                x = model.student(image[None], kept[None])
                for k, level in enumerate(levels):
                    y = level[0][[0, *(kept + 1).tolist()]]
                    y = y - y.mean(1, keepdim=True)
                    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()
                    mixed = sum(model.align.matrix[k, s] * x[s][0] for s in range(4))
                    d = (model.align.adaptors[k](mixed) - y).abs()
                    total = total + torch.where(d <= 1, d * d / 2, d - 0.5).mean() / 3 / 12
        total.backward()
        rate = peak * (step + 1) / 2 if step < 2 else (
            1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * (step - 1) / 4)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        losses.append(total.item())
    assert logged(tmp_path / "out", "loss") == pytest.approx(losses, rel=1e-4)
    assert same(weights(tmp_path / "out"), model.student.state_dict(), 2e-4)


COUNT = """
import atexit, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
exchanged, hooked = [], []
def exchange(_, bucket):
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)
def watch(module, arguments):
    if isinstance(module, DistributedDataParallel) and not hooked:
        hooked.append(module.register_comm_hook(None, exchange))
torch.nn.modules.module.register_module_forward_pre_hook(watch)
atexit.register(lambda: print("exchanged", len(exchanged), len(set(exchanged))))
"""


def test_gradients_are_exchanged_once_a_step(tmp_path, painted):
    """However many micro-batches it has."""
    counts = []
    for most in (6, 2):
        argv = on_folder(painted, tmp_path / str(most), "--micro-batch", most, "--epochs", 2)
        counts += [re.search(r"exchanged (\d+) (\d+)", rank.out).groups()
                   for rank in run_ranks(*argv, first=COUNT)]
    assert len({*counts}) == 1 and int(counts[0][0]) == 6 * int(counts[0][1])


def test_every_step_has_a_mask_of_its_own(tmp_path, painted, hooks):
    masks = []

    def watch(module, arguments):
        if type(module).__name__ == "MaskAlign" and not masks:
            masks.append(None)
            module.student.register_forward_pre_hook(keep_of, with_kwargs=True)

    def keep_of(student, arguments, options):
        if student.training:
            call = inspect.signature(student.forward).bind(*arguments, **options)
            masks.append(call.arguments["keep"])
    hooks.before_forward(watch)
    main(*on_folder(painted, tmp_path, "--mask", "random", "--micro-batch", 6))
    rows = [tuple(sorted(row)) for keep in masks[1:] for row in keep.tolist()]
    assert len(rows) == 144 == len(set(rows)) and {len(row) for row in rows} == {19}


def test_the_log_has_the_mean_loss_and_the_median_norm(tmp_path, painted, hooks):
    losses, norms = [], []
    hooks.after_forward(lambda module, arguments, output: losses.append(output.item())
                        if type(module).__name__ == "MaskAlign" else None)
    hooks.before_step(lambda optimiser, *_: norms.append(torch.cat([
        p.grad.flatten() for group in optimiser.param_groups for p in group["params"]]).norm()))
    main(*on_folder(painted, tmp_path, "--save-every", 5, "--blr", 0.05, "--eval-every", 100))
    parts = [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert logged(tmp_path, "loss") == pytest.approx(
        [sum(losses[part]) / len(losses[part]) for part in parts], rel=1e-5)
    assert logged(tmp_path, "grad_norm") == pytest.approx(
        [torch.stack(norms[part]).median().item() for part in parts], rel=1e-4)


def test_the_log_is_written_every_ten_steps_and_where_it_is_saved(tmp_path, painted):
    main(*on_folder(painted, tmp_path, "--save-every", 4))
    assert logged(tmp_path) == [4, 8, 10, 12] and set(json.loads(
        (tmp_path / "log.jsonl").read_text().splitlines()[0])) >= {
        "step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait"}


def test_nothing_is_saved_between_times(tmp_path, painted):
    Child(*on_folder(painted, tmp_path), first=signalled(11)).wait(-9)
    assert logged(tmp_path) == [10] and saved(tmp_path) == 0


def test_the_log_is_closed(tmp_path, painted):
    done = run(*on_folder(painted, tmp_path, "--epochs", 1),
               first="import warnings; warnings.simplefilter('error', ResourceWarning)")
    assert "ResourceWarning" not in done.err


def test_speed_is_told_apart_from_waiting(tmp_path, painted):
    """A picture takes 0.02 s to open, however fast the rest of it is on this machine."""
    began = time.monotonic()
    run(*on_folder(painted, tmp_path, "--micro-batch", 6, "--epochs", 2), first="""
import time
import PIL.Image
real = PIL.Image.open
PIL.Image.open = lambda *arguments: (time.sleep(0.02), real(*arguments))[1]""")
    for speed, wait in zip(logged(tmp_path, "images_per_s"), logged(tmp_path, "data_wait")):
        assert 72 / speed < time.monotonic() - began  # all 6 steps of 12
        assert speed < 50 and 0.02 <= wait / speed and wait < 1


def test_graphs_are_whole_and_compiled_once(tmp_path, painted):
    """With evaluation in between; a small backend stands for the compiler's."""
    run(*on_folder(painted, tmp_path, "--compile"), first="""
import functools, torch
torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
torch._dynamo.config.error_on_recompile = True""")
    assert saved(tmp_path) == 12


WAITS = """
import torch, train
train.LOG_EVERY = 100
from torch.optim.optimizer import register_optimizer_step_post_hook
steps = []
def watch(*_):  # of 27 steps, 20 after those that compile
    steps.append(1)
    torch.cuda.set_sync_debug_mode("error" if 4 <= len(steps) < 24 else "default")
register_optimizer_step_post_hook(watch)
"""


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_for_the_gpu_only_where_it_logs(tmp_path, painted, amp):
    run(*on_folder(painted, tmp_path), "--device", "cuda", "--amp", amp, "--epochs", 9,
        "--micro-batch", 6, "--eval-every", 100, first=WAITS, anew=True)
    assert saved(tmp_path) == 27


# --- Faults --------------------------------------------------------------------------------------

UNTOUCHED = """
import os, torch
from torch.optim import optimizer
steps, before = [], []
def weights(optimiser):
    return [p.detach().clone() for group in optimiser.param_groups for p in group["params"]]
def remember(optimiser, *_):
    before[:] = weights(optimiser)
def compare(optimiser, *_):
    steps.append(all(map(torch.equal, before, weights(optimiser))))
    print("untouched" if steps[-1] else "taken", flush=True)
optimizer.register_optimizer_step_pre_hook(remember)
optimizer.register_optimizer_step_post_hook(compare)
def spoil(module, arguments, output):
    if type(module).__name__ == {kind!r} and module.training and len(steps) == 2:
        if os.environ.get("RANK", "0") == {rank!r}:
            {how}
torch.nn.modules.module.register_module_forward_hook(spoil)
"""


def spoilt(how, rank=0, kind="MaskAlign"):
    """At step 3, on one rank, after a network's forward pass. Each step says if it was taken."""
    return UNTOUCHED.format(how=how, rank=str(rank), kind=kind)


@pytest.mark.parametrize("how", ["return output + float('inf')",
                                 "output.register_hook(lambda grad: grad * float('nan'))"])
def test_no_step_is_taken_with_what_is_not_finite(tmp_path, folder, how):
    """A loss, though its gradient would be finite, and a gradient, though its loss is."""
    done = run(*on_folder(folder, tmp_path, "--save-every", 2), code=2, first=spoilt(how))
    error = one_line(done)
    assert "step 3" in error and "rank 0" in error and error.count(".JPEG") == 12
    rate = 1.5e-4 * 12 / 256
    assert re.search(r"lr (\S+?)[,;: ]", error) and float(
        re.search(r"lr (\S+?)[,;: ]", error)[1]) == pytest.approx(rate, rel=0.01)
    assert done.out.split().count("taken") == 3 and done.out.split().count("untouched") == 1
    assert saved(tmp_path) == 2 and logged(tmp_path) == [2]


def test_one_rank_of_two_meets_a_loss_that_is_not_finite(tmp_path, painted):
    """Rank 1 has 6 of the 12 images of step 3; neither rank takes that step."""
    first = spoilt("""reds = arguments[0][:, 0].double().mean((1, 2))
            print("seen", *(reds / 7).round().tolist())
            return output + float("inf")""", rank=1)
    ranks = run_ranks(*on_folder(painted, tmp_path, "--micro-batch", 3), code=2, first=first)
    seen = re.findall(r"\d+\.0", ranks[1].out)
    for rank in ranks:
        error = one_line(rank)
        assert "step 3" in error and "rank 1" in error
        assert sorted(re.findall(r"(\d+)\.png", error)) == sorted(x[:-2] for x in seen)
        assert re.findall("untouched|taken", rank.out)[1:4] == ["taken", "untouched", "taken"]
    assert saved(tmp_path) == 0 and len(seen) == 6


def finite_weights(out):
    return all(x.isfinite().all() for part in ("student", "align", "head") if part in last(out)
               for x in last(out)[part].values() if x.is_floating_point())


def test_fp16_may_skip_half_of_the_steps_and_the_log_stays_json(tmp_path, painted, hooks):
    """Gradients may overflow while its scale adapts: such a step is not taken, and no error."""
    taken, matrices = [], []

    def overflow(module, arguments, output):
        if type(module).__name__ == "MaskAlign":
            if len(taken) % 2:
                output.register_hook(lambda grad: grad + math.inf)
            matrices.append(module.align.matrix.detach().clone())
    hooks.after_forward(overflow)
    hooks.after_step(lambda *_: taken.append(1))
    main(*on_folder(painted, tmp_path, "--amp", "fp16", "--batch-size", 4, "--epochs", 1.34))
    still = [torch.equal(a, b) for a, b in zip(matrices, matrices[1:])]
    assert still == [step % 2 == 1 for step in range(11)]
    assert logged(tmp_path) == [10, 12] and finite_weights(tmp_path)
    assert all(norm is None or 0 < norm < 1e6 for norm in logged(tmp_path, "grad_norm"))


def test_fp16_that_skips_all_steps_ends(tmp_path, painted):
    """And the norms of the first two, which it took, are in the log until then."""
    first = spoilt(
        "module.align.adaptors[0].bias.register_hook(lambda grad: grad + float('inf'))").replace(
        "len(steps) == 2", "len(steps) >= 2")
    done = run(*on_folder(painted, tmp_path, "--amp", "fp16", "--batch-size", 4, "--epochs", 3),
               first=first, code=2)
    assert "step" in one_line(done)
    norms = logged(tmp_path, "grad_norm")
    assert norms and 0 < norms[0] < 1e6 and norms[1:] == [None] * (len(norms) - 1)


def test_a_probe_whose_first_step_fp16_skips_trains(tmp_path, painted):
    """Memory that nobody has set is full of NaN here."""
    run(*on_folder(painted, tmp_path, "--task", "probe", "--amp", "fp16"), first=spoilt(
        "output.register_hook(lambda grad: grad + float('inf'))", kind="Classifier").replace(
            "len(steps) == 2", "len(steps) == 0") + "torch.use_deterministic_algorithms(True)\n")
    assert finite_weights(tmp_path) and logged(tmp_path, "loss")[-1] < 1
    for moments in last(tmp_path)["optimiser"]["state"].values():
        assert 0 < moments["momentum_buffer"].abs().max() < 100


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_too_little_memory_names_the_micro_batch(tmp_path, painted, task):
    done = run(*on_folder(painted, tmp_path, "--task", task, "--micro-batch", 5), code=2, first="""
import torch
def full(module, arguments):
    if type(module).__name__ == "Block" and module.training:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
torch.nn.modules.module.register_module_forward_pre_hook(full)""")
    assert "--micro-batch" in one_line(done) and "9 GiB" in one_line(done) and saved(tmp_path) == 0


def test_little_shared_memory_is_told_at_once(tmp_path, painted, monkeypatch, capsys):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(50000, 0, 50000))
    argv = on_folder(painted, tmp_path, "--workers", 1, "--micro-batch", 12, "--epochs", 1)
    error = refused(capsys, *argv)
    assert all(word in error for word in ("/dev/shm", "--workers", "--micro-batch", "--shm-size"))


def test_ctrl_c_is_one_line_that_says_what_is_saved(tmp_path, painted):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last.pt").touch()  # of another program
    argv = on_folder(painted, tmp_path, "--save-every", 5)
    done = run(*argv, code=130, first=signalled(7, "SIGINT"))
    said = re.search(r"step (\d+)", one_line(done, 130))
    assert int(said[1]) == saved(tmp_path) >= 5
    run(*argv)
    run(*argv, "--out", tmp_path / "whole")
    assert same(weights(tmp_path), weights(tmp_path / "whole"))


def test_ctrl_c_before_anything_is_saved(tmp_path, painted, capsys, monkeypatch):
    def stop(weight):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", stop)
    with pytest.raises(SystemExit) as ended:
        main(*on_folder(painted, tmp_path))
    assert ended.value.code == 130 and "step 0" in capsys.readouterr().err


def test_workers_change_nothing_in_a_script_without_a_guard(tmp_path, wild, background):
    """Which trains once; neither do they in a folder with broken files."""
    child, out = background["test_workers_change_nothing_in_a_script_without_a_guard"]
    run(*with_all(wild, tmp_path))
    done = child.wait(0)
    assert same(weights(tmp_path), weights(out)) and logged(tmp_path, "loss") == logged(out, "loss")
    assert done.out.count("finetune:") == 1 and all(name in done.err for name in BROKEN)


def children_of(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_ends_the_run_and_it_goes_on(tmp_path, folder, background):
    child, out = background["test_a_killed_worker_ends_the_run_and_it_goes_on"]
    done = child.wait()
    assert done.code in (1, 2) and saved(out) == 5, done
    argv = on_folder(folder, out, "--save-every", 5)
    run(*argv), run(*argv, "--out", tmp_path)
    assert equal(state(tmp_path), state(out))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_stops_at_a_signal_and_goes_on_with_the_same_command(tmp_path, two_ranks):
    """With all its processes; the command then runs to the end."""
    out, argv = two_ranks
    argv = (*argv, "--out", tmp_path)
    process = torchrun(*argv, "--epochs", 400, "--save-every", 1)
    reach(process, tmp_path, 3)
    ranks = children_of(process.pid)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode and 3 <= saved(tmp_path) < 1200 and ranks
    assert not any(Path(f"/proc/{rank}/exe").exists() for rank in ranks)


def test_torchrun_restarts_after_a_killed_rank(two_ranks, background):
    """Once, from what was saved; the end is as if nothing had happened."""
    process, out = background["test_torchrun_restarts_after_a_killed_rank"]
    output, error = process.communicate(timeout=200)
    assert process.returncode == 0 and "from 5" in output, error
    assert (out.parent / "killed").exists() and equal(state(two_ranks[0]), state(out))


# --- Entry ---------------------------------------------------------------------------------------

def test_demo_trains_teacher_and_student_with_its_flags(background):
    child, out = background["test_demo_trains_teacher_and_student_with_its_flags"]
    done = child.wait(0, seconds=300)
    assert done.out.count("of 64 = 1 processes x 2 x 32") == 2
    assert [logged(out / part)[-1] for part in ("teacher", "student")] == [5, 7]
    assert re.search(r"untrained student \d+\.\d %, trained student \d+\.\d %, teacher \d+\.\d %",
                     done.out)


# --- The tutorial --------------------------------------------------------------------------------

RUN_NOTEBOOK = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
try:
    nbclient.NotebookClient(book, timeout=500, kernel_name="python3").execute()
finally:
    nbformat.write(book, "done.ipynb")
"""


class Notebooks:
    """Runs of the tutorial, each in a folder that holds the two files and nothing else of ours; one
    after the other, beside the tests that do not need them."""
    def __init__(self):
        self.queue, self.running = concurrent.futures.ThreadPoolExecutor(1), None

    def add(self, home, **constants):
        return self.queue.submit(self.run, home, constants)

    def run(self, home, constants):
        self.running = start_notebook(home, **constants)
        return self.running.wait(), home

    def end(self):
        self.queue.shutdown(wait=False, cancel_futures=True)
        if self.running and self.running.poll() is None:
            self.running.terminate()


def start_notebook(home, **constants):
    home.mkdir(parents=True, exist_ok=True)
    for name in ("maskalign.py", "train.py"):
        shutil.copy(HERE / name, home)
    environment = dict(os.environ, LENGTH="0.01", REPEATS="1", OMP_NUM_THREADS="1") | constants
    with open(home.parent / f"{home.name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", RUN_NOTEBOOK, str(HERE / "tutorial.ipynb")], cwd=home,
            env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish_notebook(run):
    """Wait for a run -> its folder, its cells' outputs' text, and how many figures there are."""
    code, home = run.result(500)
    assert code == 0, (home.parent / f"{home.name}.log").read_text()[-3000:]
    cells = nbformat.read(home / "done.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    return home, text, sum("image/png" in output.get("data", {}) for output in outputs)


def shape_picture(kind, generator, side):
    """A square or a disc of a colour of its kind on noise -> image, its outline [x, y, x, y ...]."""
    picture = Image.fromarray(generator.integers(0, 90, (side, side, 3), dtype=numpy.uint8))
    x, y = generator.integers(2, side // 2, 2).tolist()
    size = side // 3
    draw, colour = ImageDraw.Draw(picture), (230, 60, 60) if kind else (60, 90, 230)
    if kind:
        outline = [x, y, x + size, y, x + size, y + size, x, y + size]
    else:
        turns = numpy.linspace(0, 2 * numpy.pi, 24, endpoint=False)
        corners = numpy.stack([x + size / 2 * (1 + numpy.cos(turns)),
                               y + size / 2 * (1 + numpy.sin(turns))], axis=1)
        outline = corners.flatten().tolist()
    draw.polygon(outline, fill=colour)
    return picture, outline


def make_coco(root, count=4, side=64):
    """A handful of images in COCO's format, of two classes with odd ids, one crowd among them."""
    generator = numpy.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        table = dict(images=[], annotations=[], categories=[dict(id=7, name="disc"),
                                                            dict(id=90, name="square")])
        for index in range(count):
            picture, outline = shape_picture(index % 2, generator, side)
            picture.save(root / split / f"{index:012}.jpg")
            table["images"].append(dict(id=100 + index, file_name=f"{index:012}.jpg",
                                        width=side, height=side))
            x, y = outline[::2], outline[1::2]
            thing = dict(image_id=100 + index, category_id=(7, 90)[index % 2], iscrowd=0,
                         bbox=[min(x), min(y), max(x) - min(x), max(y) - min(y)],
                         segmentation=[outline], area=1)
            table["annotations"].append(thing | dict(id=2 * index))
        table["annotations"].append(thing | dict(id=99, iscrowd=1, segmentation=dict(
            counts="", size=[side, side])))
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(HERE / "tutorial.ipynb", 4)


def make_photographs(root):
    """Ten folders where Imagenette would lie."""
    generator = numpy.random.default_rng(1)
    ids = ("n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 "
           "n03445777 n03888257").split()
    for split, count in (("train", 4), ("val", 3)):
        for kind, wordnet in enumerate(ids):
            folder = root / "imagenette2-320" / split / wordnet
            folder.mkdir(parents=True)
            for index in range(count):
                shape_picture(kind % 2, generator, 96)[0].save(folder / f"{wordnet}_{index}.JPEG")


@pytest.fixture(scope="session", autouse=True)
def tutorials(tmp_path_factory):
    """In short, on digits, with a handful of COCO-format images for its section 12, and then on
    photographs, with a teacher of random weights and small networks."""
    root, runs = tmp_path_factory.mktemp("tutorial"), Notebooks()
    make_coco(root / "coco")
    make_photographs(root / "photographs" / "data")
    yield SimpleNamespace(
        digits=runs.add(root / "digits", COCO=str(root / "coco")),
        photographs=runs.add(root / "photographs", DATA="imagenette", LEVELS="3",
                             STUDENT="vit_digits_patch4_32", TEACHER="vit_digits_patch4_32 random"))
    runs.end()


def test_tutorial_is_of_these_files(notebook):
    for name, value in notebook.metadata["maskalign"].items():
        found = hashlib.sha256((HERE / name).read_bytes()).hexdigest()
        assert found == value, f"{name} has changed since tutorial.ipynb was run; run it again"
    assert sorted(notebook.metadata["maskalign"]) == ["maskalign.py", "train.py"]


def test_tutorial_is_committed_as_one_run(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell.source.splitlines()) <= 20 for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(json.dumps(outputs)) < 2e6
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 16
    assert not re.search(r"/(tmp|root|home|work)/", "".join(o.get("text", "") for o in outputs))


def test_tutorial_runs(tutorials):
    """By a real kernel, in a folder that holds nothing else; here, last, so that it is done."""
    home, text, figures = finish_notebook(tutorials.digits)
    assert figures >= 16
    rated = re.search(r"COCO format: AP of boxes ([\d.]+), of masks ([\d.]+)", text)
    assert rated and all(0 <= float(ap) <= 100 for ap in rated.groups())
    left = {path.name for path in home.iterdir()} - {"__pycache__", "done.ipynb"}
    assert left == {"maskalign.py", "train.py"}


def test_tutorial_runs_on_photographs(tutorials):
    home, text, figures = finish_notebook(tutorials.photographs)
    assert figures >= 14
    assert "'classes': 10" in text or "10 classes" in text
    assert "golf ball" in (home / "done.ipynb").read_text()
    assert not (home / "data" / "imagenette2-320.tgz").exists()  # nothing was downloaded


# --- The house -----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def test_readme_points_at_the_right_lines():
    lines = (HERE / "maskalign.py").read_text().splitlines()
    rows = re.findall(r"\| `(\w+)` \| (\d+) \|", README)
    assert len(rows) >= 10
    for name, number in rows:
        assert re.match(rf"(class|def) {name}\b", lines[int(number) - 1]), name


def test_readme_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            titles = re.findall(r"^#+ (.+)$", README, re.M)
            assert link[1:] in [title.lower().replace(" ", "-") for title in titles], link
        elif not link.startswith("https://"):
            assert (HERE / link).exists(), link


def test_commands_of_the_readme_and_of_the_header_are_valid():
    texts = README + train.__doc__
    commands = re.findall(r"^    .*\btrain\.py ?([^#\n]*)", texts, re.M)
    assert len(commands) >= 12
    for command in commands:
        assert parse(*command.split()).student in ma.VITS


def test_teachers_of_the_readme_exist():
    import open_clip
    names = {name for row in re.findall(r"^\| (?:CLIP|DINO|SigLIP|MAE|your).*$", README, re.M)
             for name in re.findall(r"`([\w.-]+)[ `]", row.partition("| `")[1] + row.partition("| `")[2])}
    assert len(names) >= 12
    assert names <= {*timm.list_models(), *timm.list_pretrained(), *open_clip.list_models()}


def test_readme_snippets_run(tmp_path, monkeypatch):
    """On a smaller encoder; both ways to features give the same ones."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pre", "tune"):
        Path(folder).mkdir()
    classifier = train.Classifier(ma.vit("vit_tiny_patch16_224"), 3, probe=False).eval()
    torch.save(classifier.student.state_dict(), "pre/student.pt")
    torch.save(classifier.timm_state(), "tune/classifier.pt")
    Path("tune/classes.txt").write_text("ant\nbee\ncat\n")
    Image.effect_noise((224, 224), 80).convert("RGB").save("cat.jpg")
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    found = {}
    exec(code.replace("vit_base_", "vit_tiny_"), found)
    assert torch.allclose(found["patches"], found["features"][:, 1:], atol=1e-4)
    assert torch.allclose(found["cls"], found["features"][:, :1], atol=1e-4)
    assert Image.open("attention.png").size == (224, 224)
    hub = timm.create_model("local-dir:hub", pretrained=True, num_classes=0)
    assert tuple(hub.pretrained_cfg["mean"]) == ma.IMAGENET_MEAN_STD[0]
    assert torch.equal(hub.norm.bias, classifier.student.norm.bias)


def code_lines(text):
    """Numbers of the lines that hold code: no blank lines, comments and docstrings."""
    free = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for token in tokens if token.type not in free
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_size_and_density():
    total = 0
    for name in ("maskalign.py", "train.py"):
        text = (HERE / name).read_text()
        tree, lines, code = ast.parse(text), text.splitlines(), code_lines(text)
        assert len(list(ast.walk(tree))) / len(code) <= 13, name
        assert max(map(len, lines)) <= 100
        assert sum(len(lines[line - 1]) > 90 for line in code) <= len(code) / 10
        assert all(node.end_lineno - node.lineno < 60 for node in ast.walk(tree)
                   if isinstance(node, ast.FunctionDef))
        total += len(code)
    assert int(re.search(r"(\d+) lines of\s+code together", README)[1]) == total
