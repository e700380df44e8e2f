"""Properties of maskalign.py and train.py; sizes are drawn pairwise distinct."""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import errno
import functools
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import warnings
from fractions import Fraction
from multiprocessing import forkserver
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
import torch.distributed.run
from PIL import Image, PngImagePlugin
from hypothesis import assume, example, given, settings, strategies as st
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                    register_optimizer_step_pre_hook)
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
    torch.manual_seed(0)
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
    expected = network(*inputs)  # einops caches a type of tensors at first use
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for _ in range(3):
        same(compiled(*inputs), expected, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name, says", [
    ("resnet18", "a ResNet cannot teach"), ("beit_base_patch16_224", "a Beit cannot teach"),
    ("swin_tiny_patch4_window7_224", "a SwinTransformer cannot teach"),
    ("vit_small_r26_s32_224", "no plain ViT"), ("vit_relpos_base_patch16_cls_224", "no plain ViT"),
    ("vit_base_patch16_xp_224", "no plain softmax"),
    ("vit_small_patch16_dinov3 num_kv_groups", "no plain softmax"),  # heads that share keys
    ("vit_base_patch16_rope_reg1_gap_256", "no .CLS. and no pooling query")])
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
    for keep, expected in ((ma.attentive_keep(p.expand(40000, 4), 0.5), exact),
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
    images, levels = torch.rand(2, 3, 12, 12), torch.rand(2, 2, 10, 12, requires_grad=True)
    attention = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 1]).expand(2, -1) / 4
    mask_noise, path_noise = torch.rand(2, 9), torch.rand(2, 6)
    model = ma.MaskAlign(small_vit(drop_path=0.5), teacher, mask, 0.5).train()
    keep = (mask_noise * attention if mask == "attentive" else mask_noise).topk(4, dim=1).indices
    loss = model(images, levels, attention, mask_noise=mask_noise, path_noise=path_noise)
    same(loss, model(images, levels, attention, keep, path_noise=path_noise))
    assert torch.autograd.grad(loss, levels, allow_unused=True) == (None,)
    pytest.raises(ValueError, model, images, levels[:1], attention)  # one of K levels


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
    *[(lambda x=x: ma.random_keep(3, 10, x), "mask ratio .* masks all 10")
      for x in (0.95, 1.0, -0.1, 1.5, math.nan)],
    *[(lambda x=x: ma.attentive_keep(torch.tensor([[0.5, x]]), 0.5), "attention is negative or NaN")
      for x in (-0.1, math.nan)],
    *[(lambda x=x: ma.Teacher(small_vit(), x), f"depth 3: {x}") for x in (0, 4)],
    (lambda: ma.MaskAlign(small_vit(), ma.Teacher(small_vit(), 2), "attention"), "'attention'"),
    (lambda: ma.MaskAlign(small_vit(), ma.Teacher(small_vit(), 2), "random", 0.95), "masks all 9"),
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
    "safetensors": (lambda s: s, "")}


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
    (lambda s: {"conv_proj.weight": X}, "it holds conv_proj.weight.*torchvision")])
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
    ("missing.safetensors", lambda f: None, "No such file")])
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


@pytest.mark.parametrize("name, weights, says", [("ViT-test-14", "", "not read"),
    ("ViT-B-16-quickgellu", None, "no plain ViT"), ("resnet18", None, "a ResNet cannot teach"),
    ("RN50", None, "RN50 cannot teach"), ("ViT-B-16-SigLIP", None, "SigLIP cannot teach"),
    ("ViT-B-16", "openai", "openai and ViT-B-16 differ in QuickGELU"),
    ("ViT-test-14", "missing.pt", "missing.pt was not read: .*No such file"),
    ("vit_digits_patch4_32", "missing.pt", "missing.pt was not read: .*No such file"),
    ("vit_tiny_patch16_224", "pretrained", "teacher vit_tiny_patch16_224 .*--teacher-weights FILE"),
    ("ViT-B-16-quickgelu", "pretrained", "--teacher-weights FILE needs no download: .*openai"),
    ("hf-hub:nobody/nothing", "pretrained", "--teacher-weights FILE needs no download"),
    ("local-dir:missing", "pretrained", "--teacher-weights FILE needs no download")])
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


# --- Processes: forked from a server that has imported what takes seconds -----------------------
os.environ["OMP_NUM_THREADS"] = "1"  # of all processes that are started below
forkserver.set_forkserver_preload([
    "torch._dynamo", "timm", "open_clip", "torchvision.transforms.v2"])
forkserver.ensure_running()
SERVER = multiprocessing.get_context("forkserver")
CHILD = """
import atexit, multiprocessing, os, runpy, signal, sys, time, torch
from multiprocessing import resource_tracker
from torch.optim.optimizer import register_optimizer_step_post_hook as after_step
multiprocessing.set_start_method(None, force=True)  # the default one, and a tracker of its own,
resource_tracker._resource_tracker._fd = None       # as a new process has
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.clear()
os.environ.update(env)
for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), stream)
sys.argv = argv
before_forward = torch.nn.modules.module.register_module_forward_pre_hook
children = lambda pid: open(f"/proc/{pid}/task/{pid}/children").read().split()
try:
    exec(first, globals())
    runpy.run_path(argv[0], run_name="__main__")
finally:
    atexit._run_exitfuncs()
"""


class Child:
    """A process that executes `first`, a few lines, and then a script as python does."""
    lock = threading.Lock()  # one thread at a time asks for the state of processes

    def __init__(self, *argv, first="", script=HERE / "train.py", **environment):
        self.folder = Path(tempfile.mkdtemp(prefix="child-"))
        env = {key: str(value) for key, value in (os.environ | environment).items()}
        order = dict(argv=[str(script), *map(str, argv)], env=env, first=first,
                     folder=str(self.folder))
        self.process = SERVER.Process(target=exec, args=(CHILD, order))
        with self.lock:
            self.process.start()

    def wait(self, code=0, seconds=240, reap=True):
        """What it wrote, once it has ended with this exit status."""
        ended, until = None, time.monotonic() + seconds
        while ended is None and time.monotonic() < until:
            time.sleep(0.02)
            with self.lock:
                ended = self.process.exitcode
        if reap or ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # also what it has started
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        shutil.rmtree(self.folder)
        assert ended == code, f"exit status {ended}\n{out}\n{err}"
        return SimpleNamespace(out=out, err=err)


def start(*argv, ranks=1, **more):
    """One process, or those that torchrun would start."""
    world = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=free_port())
    return [Child(*argv, **dict(RANK=rank, LOCAL_RANK=rank) | world if ranks > 1 else {}, **more)
            for rank in range(ranks)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# run: what each rank wrote; main: the script in this process; trained: what train.train returns
def run(*argv, code=0, **more): return [child.wait(code) for child in start(*argv, **more)]
def main(*argv): train.main([*map(str, argv)])
def parse(*argv): return train.parse([*map(str, argv)])
def trained(*argv): return train.train(parse(*argv))


def one_line(error):
    """The one line with which the script ended."""
    [line] = [line for line in error.splitlines() if "train.py:" in line]
    assert "Traceback" not in error, error
    return line


def refused(*argv):
    """The line with which the script refuses a command, written at once: else two ranks' words mix
    where Python does not buffer (PYTHONUNBUFFERED)."""
    written = []
    stream = SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: False)
    with contextlib.redirect_stderr(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit, match="^2$"):
            main(*argv)
    assert re.fullmatch("train.py: error: .+\n", written[-1])
    return one_line("".join(written))


def at_step(step, action):
    """Lines for Child: an action after an optimiser step, counted from 1, before it is saved."""
    return f"""
def note(optimiser, *_, taken=[]):
    taken.append(1)
    if len(taken) == {step}:
        {action.strip()}
after_step(note)
"""


def signalled(step, name="SIGKILL", rank="any", times=1):
    return at_step(step, f"""
        if {rank!r} in ("any", int(os.environ.get("RANK", 0))):
            [os.kill(os.getpid(), signal.{name}) for _ in range({times})]""")


@pytest.fixture
def hooks():
    """torch's, until the test ends: of all modules of a kind, a class's name, or optimisers."""
    handles, modules = [], torch.nn.modules.module

    def of(register, kind=None):
        return lambda hook: handles.append(register(
            lambda it, *rest: hook(it, *rest) if kind in (None, type(it).__name__) else None))
    yield SimpleNamespace(before_step=of(register_optimizer_step_pre_hook),
                          after_step=of(register_optimizer_step_post_hook),
                          before=lambda kind: of(modules.register_module_forward_pre_hook, kind),
                          after=lambda kind: of(modules.register_module_forward_hook, kind))
    for handle in handles:
        handle.remove()


def spy(monkeypatch, owner, name):
    """A list that is filled with the arguments of each call of owner.name."""
    seen, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **options: (
        seen.append((arguments, options)), function(*arguments, **options))[1])
    return seen


QUEUE = concurrent.futures.ThreadPoolExecutor(1)  # what takes long, one after the other
EARLY = ("undisturbed", "torchrun", "demo", "compiled", "tutorials")


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Starts with the fixtures that take long and are asked for: they run beside the tests."""
    used = {name for item in request.session.items for name in item.fixturenames}
    for name in EARLY:
        with contextlib.suppress(Exception):  # which its tests meet again
            name in used and request.getfixturevalue(name)
    yield
    QUEUE.shutdown(wait=False, cancel_futures=True)


# --- Folders of images, and runs on them ---------------------------------------------------------
SMALL = ("--student", "vit_digits_patch4_32", "--teacher", "vit_digits_patch4_32",
         "--teacher-weights", "random", "--levels", 3, "--device", "cpu", "--workers", 0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes of 12 + 4 noisy colours; the names are long, spaced and not ASCII."""
    root = tmp_path_factory.mktemp("data")
    for label, colour in enumerate(((200, 20, 20), (20, 200, 20), (20, 20, 200))):
        for i in range(16):
            split = "train" if i < 12 else "val"
            file = root / split / f"class {label} é" / f"{'long ' * 20}{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((60, 45), 90).convert("RGB").point(
                [min(255, v // 3 + c) for c in colour for v in range(256)]).save(file)
    return root


def touch(root, *names):
    """Pictures, each of a colour by which `which` knows its number; links; or other files."""
    for i, (name, *target) in enumerate(name.split("->") for name in names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / name).symlink_to(root / target[0])
        elif name.endswith((".txt", ".heic")) or "bad" in name:
            (root / name).write_text("no image")
        else:
            colour = 7 * (i % 36), 255 - 7 * (i % 36), i % 2 * 200
            Image.new("RGB", (60, 45), colour).save(root / name)
    return root


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    """36 training and 5 evaluation pictures of two classes, each of a colour of its own."""
    root = tmp_path_factory.mktemp("painted")
    for split, count in (("train", 36), ("val", 5)):
        touch(root, *(f"{split}/{'ab'[i % 2]}/{i}.png" for i in range(count)))
    return root


def flags(**options):
    """seed=1, compile=True -> "--seed", 1, "--compile"."""
    return [part for name, value in options.items()
            for part in (f"--{name.replace('_', '-')}", value) if part is not True]


def on_folder(root, out, **options):
    """12 steps, 3 an epoch."""
    return (*flags(data=root, out=out), *SMALL, *flags(**dict(
        batch_size=12, epochs=4, warmup_epochs=1, eval_every=2) | options))


def one_step(root, out, **options):
    return on_folder(root, out, **dict(epochs=0.4, warmup_epochs=0) | options)


def sources(root, size=(32, 32), **options):
    return train.open_data(parse(*flags(data=root, **options)), size)


# the numbers of painted pictures uint8 [B,3,H,W]; what a folder has: last.pt, its step or -1, ...
def which(images): return [round(red / 7) for red in images[:, 0].double().mean((1, 2)).tolist()]
def last(out): return torch.load(Path(out) / "last.pt")
def saved(out): return last(out)["step"] if (Path(out) / "last.pt").exists() else -1
def weights(out): return torch.load(Path(out) / "student.pt")


def encoder_file(folder):
    """A small encoder's random weights."""
    torch.manual_seed(7)
    torch.save(ma.vit("vit_digits_patch4_32").state_dict(), folder / "init.pt")
    return folder / "init.pt"


def logged(out, key="step"):
    with open(Path(out) / "log.jsonl") as log:
        return [json.loads(line, parse_constant=pytest.fail).get(key) for line in log]


def state(out):
    """What all files of weights hold, without the times in the log."""
    content = {path.name: torch.load(path) for path in sorted(Path(out).glob("*.pt"))}
    for record in content["last.pt"]["log"]:
        del record["images_per_s"], record["data_wait"]
    return content


# --- Recipes and command line --------------------------------------------------------------------
@pytest.mark.parametrize("argv, expected", [("", (1, 64, 8e-3, 1e-6, 0.1, 0.05, 0, 1, 1, 3)),
    ("--data x", (200, 1024, 1.5e-4, 1e-5, 20, 0.05, 0.1, 1, 20, 5)),
    ("--data digits_photos --task finetune", (100, 1024, 3e-4, 1e-6, 5, 0.05, 0.2, 0.55, 1, 5)),
    ("--data x --task probe", (90, 16384, 0.025, 0, 10, 0, 0, 1, 1, 5)),
    ("--data x --epochs 20 --blr 0 --min-lr 0 --weight-decay 0 --drop-path 0 --layer-decay 0 "
     "--eval-every 0 --mask-ratio 0.7", (20, 1024, 0, 0, 20, 0, 0, 0, 0, 5)),
    ("--data digits:7 --task finetune --epochs 0.05",  # less than its warm-up
     (0.05, 64, 8e-3, 1e-6, 0.1, 0.05, 0, 1, 1, 3))])
def test_recipes_are_the_papers(argv, expected):
    keys = ("epochs batch_size blr min_lr warmup_epochs weight_decay drop_path layer_decay "
            "eval_every levels student teacher").split()
    names = ("vit_digits_patch4_32",) * 2 if expected[-1] == 3 else (
        "vit_base_patch16_224", "ViT-B-16-quickgelu")
    args = vars(parse(*argv.split()))
    assert tuple(args[key] for key in keys) == expected + names and args.items() >= dict(
        mask="attentive", mask_ratio=0.7, seed=0, teacher_weights="pretrained").items()
    assert parse().task == "pretrain" and train.LOG_EVERY == 10


def test_help_lists_every_flag_and_default_and_is_what_is_parsed(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    text = capsys.readouterr().out
    words = {f"--{name.replace('_', '-')}" for name in vars(parse())} - {"--compile"}
    words |= {"16384", "1.5e-4", "0.55", "ViT-B-16-quickgelu", "--[no-]compile", "HxW"}
    assert not [word for word in words if word not in text]
    monkeypatch.setattr(train, "__doc__", train.__doc__.replace("1.5e-4", "7e-4  "))
    assert parse("--data", "x").blr == 7e-4
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for ranks in (0.01, 1, 2, 100):  # the first is as if there were 100 times the CPUs
        monkeypatch.setattr(train, "LOCAL_WORLD", ranks)
        assert parse("--data", "x").workers == max(1, min(16, cpus // ranks))


@pytest.mark.parametrize("argv, says", [
    ("--data /nowhere --epochs 30", "/nowhere"), ("--teacher nope", "nope"),
    ("--student nope", "nope"), ("--mask-ratio 0.999", "0.999"), ("--mask-ratio 1.01", "1.01"),
    ("--levels 9", "levels"), ("--levels x", "--levels"), ("--levels 0", "--levels"),
    ("--teacher ViT-B-16 --teacher-weights openai", "quickgelu"), ("--image-size 0", "0"),
    ("--teacher RN50 --teacher-weights random", "RN50"), ("--layer-decay 1.5", "--layer-decay"),
    ("--batch-size 0", "--batch-size"), ("--micro-batch 0", "--micro-batch"),
    ("--save-every 0", "--save-every"), ("--epochs inf", "--epochs"), ("--blr nan", "--blr"),
    ("--warmup-epochs inf", "--warmup-epochs"), ("--min-lr -1", "--min-lr"),
    ("--seed -1", "--seed"), ("--data digits:0", "digits:0"), ("--data digits:x", "digits:x"),
    ("--data digits:10000000000", "digits:10000000000"), ("--device gpu", "gpu"),
    ("--drop-path 1", "--drop-path"), ("--mask none", "--mask"), ("--task both", "--task"),
    ("--image-size large", "large"), ("--init=", "empty"), ("--teacher-weights=", "empty"),
    ("--out=", "empty"), ("--init /nowhere.pt", "/nowhere.pt"), (f"--out {__file__}/out", __file__),
    ("--data digits_of_mine --teacher-weights pretrained --epochs 30", "no such folder"),
    ("--data x --epochs 5 --warmup-epochs 5.5", "--epochs"), ("--nonsense", "nonsense"),
    ("--data x --task probe --epochs 5", "--warmup-epochs"),
    ("--task probe --micro-batch 1", "--micro-batch"), ("--task probe --batch-size 1", "BatchNorm"),
    ("--task probe --batch-size 13 --micro-batch 4", "--micro-batch"), ("--image-size 30", "30"),
    *[pytest.param(f"--device {name}", name, marks=pytest.mark.skipif(there, reason="is there"))
      for name, there in (("cuda", torch.cuda.is_available()),
                          ("mps", torch.backends.mps.is_available()))]])
def test_invalid_arguments_end_in_one_line(tmp_path, argv, says):
    argv = "--data", "digits:96", "--out", tmp_path / "out", *SMALL, *argv.split()
    assert says in refused(*argv)
    assert not any((tmp_path / "out" / name).exists() for name in ("last.pt", "teacher"))


def test_a_gpu_is_made_the_current_one_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: fail(RuntimeError(f"GPU {i}"))())
    assert "GPU 1" in refused("--device", "cuda:1") and "GPU 0" in refused("--device", "cuda")


@pytest.mark.parametrize("environment, says", [
    (dict(RANK=0, WORLD_SIZE=5), "64 .* 5 ranks"), (dict(SLURM_STEP_NUM_TASKS=2), "torchrun"),
    (dict(WORLD_SIZE=2), "RANK"), (dict(RANK=1), "MASTER_ADDR|WORLD_SIZE"),
    (dict(RANK=0, WORLD_SIZE=2), "MASTER_ADDR"), (dict(SLURM_NTASKS=4), None),
    (dict(WORLD_SIZE="", RANK=""), None), (dict(RANK=0, SLURM_STEP_NUM_TASKS=2), None)])
def test_launches_that_lack_something_end_in_one_line(tmp_path, painted, environment, says):
    """An allocation of SLURM, or empty variables, are no launch."""
    argv = one_step(painted, tmp_path) if says is None else ()
    [done] = run(*argv, code=2 if says else 0, **environment)
    assert says is None or re.search(says, one_line(done.err))


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), RuntimeError("a bug"),
                                   KeyboardInterrupt("a bug")])
def test_a_bug_keeps_its_traceback_and_a_notebook_its_signals(tmp_path, painted, hooks, error):
    def slip(module, arguments):
        assert logging.getLogger("mine").isEnabledFor(logging.WARNING)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        raise error
    hooks.before("Block")(slip)
    with pytest.raises(type(error), match="a bug"):
        main(*on_folder(painted, tmp_path))


# --- Data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("data, count, fixed", [("digits", 76800, False), ("digits:50", 50, True)])
def test_digits_are_reproducible_and_their_sets_disjoint(data, count, fixed):
    keys, found = [(0, i) for i in range(20)], sources(data)
    assert [len(source) for source in found] == [count, 2000, 1000]
    first, again, later = ([source[[(epoch, i) for _, i in keys]][0] for source in found]
                           for epoch in (0, 0, 1))
    other = [source[keys][0] for source in sources(data, seed=1)]
    same(first, again)
    assert [torch.equal(*pair) for pair in zip(first, later)] == [fixed, True, True]
    # all runs are evaluated on the same digits
    assert [torch.equal(*pair) for pair in zip(first, other)] == [False, False, True]
    assert not any(torch.equal(first[a], first[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    images, labels = found[0][keys]
    assert labels.tolist() == [*range(10)] * 2 and found[0].classes == list("0123456789")
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8


def test_digits_are_legible():
    """The nearest of ten mean images names 500 others better than chance, 0.1, by far."""
    bank, val = (source[[(0, i) for i in range(500)]][0].float().flatten(1)
                 for source in sources("digits")[1:])
    means = torch.stack([bank[digit::10].mean(0) for digit in range(10)])
    assert means.mean(1).argmin() == 1 and len(bank.unique(dim=0)) == 500  # 1 has the least ink
    guess = torch.cdist(val - val.mean(1, True), means - means.mean(1, True)).argmin(1)
    assert (guess == torch.arange(500) % 10).float().mean() > 0.2


def numbers(source):
    """The numbers of a source's pictures, and their labels."""
    images, labels = source[[(0, i) for i in range(len(source))]]
    return dict(zip(which(images), labels.tolist(), strict=True))


@pytest.mark.parametrize("files, classes, bank, val", [
    ("train/b/0.png train/a/1.png train/a/deeper/2.png train/3.png val/b/4.png val/5.png "
     "aside/c/6.png train/a/x.txt train/empty/x.txt", ["a", "b"], {0: 1, 1: 0, 2: 0}, {4: 1}),
    ("train/a/0.png train/b/1.png", ["a", "b"], {0: 0, 1: 1}, None),
    ("0.png deeper/1.png val/2.png", [], {0: 0, 1: 0}, None),
    ("train/0.png val/1.png", [], {0: 0}, None),
    ("0.jfif 1.jp2 2.avif 3.GIF 4.webp 5.TIFF 6.bmp 7.jpg 8.JPEG 9.txt x.heic", [],
     dict.fromkeys(range(9), 0), None),
    ("aside/0.png b/1.png train/a/2.png train/b/3.png train/a/linked->aside "
     "train/b/link.png->b/1.png", ["a", "b"], {0: 0, 1: 1, 2: 0, 3: 1}, None),
    ("train/cafe\u0301/0.png train/b/1.png val/caf\u00e9/2.png",  # a Mac's é, and another's
     ["b", "caf\u00e9"], {0: 1, 1: 0}, {2: 1}),
    ("all/0.png all/.ipynb_checkpoints/1.png .hidden/2.png", [], {0: 0}, None),  # hidden, a Mac's
    ("train/a/0.png train/b/1.png train/.ipynb_checkpoints/2.png train/a/.ipynb_checkpoints/3.png "
     "train/__MACOSX/4.png train/a/__MACOSX/5.png __MACOSX/6.png .hidden/7.png train/a/.8.png "
     "train/a/._bad.png", ["a", "b"], {0: 0, 1: 1}, None)])
def test_classes_are_the_folders_in_train(tmp_path, capsys, files, classes, bank, val):
    data, *others = sources(touch(tmp_path, *files.split()))
    other = len(re.findall(r"\.(?:txt|heic)", files))
    assert f"{other} files of other kinds" in (capsys.readouterr().out or "0 files of other kinds")
    assert data.classes == classes and set(numbers(data)) <= set(bank) and len(data) == len(bank)
    assert [source and numbers(source) for source in others] == [bank, val]
    assert data.names.tolist() == sorted(data.names)  # an array, which forked workers share


@pytest.mark.parametrize("files, more, says", [
    ("train/a/0.png train/b/1.png val/new/2.png", {}, "new"),
    ("train/a/0.png train/b/1.png val/2.png", {}, "val"),  # flat, as from Kaggle
    ("train/a/0.png train/b/1.png val/a/x.txt", {}, "val"), ("x.heic", {}, "no image"),
    ("train/animals/cat/0.png train/animals/dog/1.png", dict(task="finetune"), "animals"),
    ("train/animals/cat/0.png train/animals/dog/1.png", dict(task="probe"), "animals"),
    ("0.png 1.png", dict(task="probe"), "two class folders"),
    ("bad0.png bad1.png bad2.png", {}, "error: 3 of 3 .* unreadable"),
    ("bad0.png bad1.png bad2.png", dict(workers=1), "error: 3 of 3 .* unreadable")])
def test_folders_that_do_not_fit_end_in_one_line(tmp_path, files, more, says):
    data = touch(tmp_path / "data", *files.split())
    assert re.search(says, refused(*on_folder(data, tmp_path / "out", **more)))


def test_all_ranks_have_the_folder_that_rank_0_sees(tmp_path):
    """Another has one image more, as on a network disk that lags behind. No names are gathered."""
    for rank in range(2):
        touch(tmp_path / str(rank), *(f"data/{i:02}.png" for i in range(12 + rank)))
    first = f"""
there = torch.accelerator.current_accelerator
torch.accelerator.current_accelerator = lambda **_: torch.device("cuda")  # a GPU that is not used
before_forward(lambda *_: setattr(torch.accelerator, "current_accelerator", there))
os.chdir({str(tmp_path)!r} + "/" + os.environ.get("RANK", "0"))
gather = torch.distributed.all_gather_object
torch.distributed.all_gather_object = lambda ranks, mine: gather(ranks, mine, no_names(mine))
def no_names(mine):
    assert "png" not in str(mine)"""
    argv = on_folder("data", tmp_path / "2", epochs=2, mask="random")
    assert "12 images" in run(*argv, ranks=2, first=first)[0].out
    run(*argv, "--out", tmp_path / "1", first=first)
    same(weights(tmp_path / "2"), weights(tmp_path / "1"), atol=2e-4)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Pictures as they are met in the wild, of two halves; and files that are no pictures."""
    root = tmp_path_factory.mktemp("zoo")
    image = Image.new("RGB", (80, 40), (250, 10, 10))
    image.paste((10, 10, 250), (40, 0, 80, 40))
    image.save(root / "UPPER.JPG", quality=95)
    image.save(root / "png.JPEG", format="PNG")
    image.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    more = PngImagePlugin.PngInfo()
    more.add_text("Comment", "x" * 2_000_000, zip=True)  # as scanners do
    image.quantize(4).save(root / "palette.png", pnginfo=more, icc_profile=bytes(2_000_000))
    image.save(root / "animated.gif", save_all=True, append_images=[image.rotate(90)] * 2)
    odd = b"Exif\0\0II*\0" + struct.pack(  # turned by 90°; and a resolution in letters
        "<IHHHIIHHI4sI", 8, 2, 0x0112, 3, 1, 6, 0x011A, 2, 3, b"72\0\0", 0)
    image.rotate(90, expand=True).save(root / "exif.jpg", quality=95, exif=odd)
    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (40, 0, 80, 40))
    clear.save(root / "alpha.png")
    half = numpy.repeat([[1.0, 0.0]], 40, 1).repeat(40, 0)
    Image.fromarray(half.astype("float32")).save(root / "float.tif")
    grey = (20000 + 40000 * half).astype("uint16")
    Image.fromarray(grey.astype("float32")).save(root / "wide.tif")
    Image.fromarray(grey).save(root / "grey16.png")
    Image.frombytes("I;16B", (80, 40), grey.byteswap().tobytes()).save(root / "imagej.tif")
    (root / "text.jpg").write_text("no image")
    (root / "truncated.jpg").write_bytes((root / "UPPER.JPG").read_bytes()[:500])
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "bomb.png").write_bytes(b"P5 50000 50000 255\n" + bytes(99999))  # a PGM's header
    (root / "x.jpg").mkdir()
    return root


BROKEN = ("text.jpg", "truncated.jpg", "gone.jpg", "bomb.png")


@pytest.mark.parametrize("names, left, right", [
    ("UPPER.JPG png.JPEG cmyk.jpg palette.png animated.gif exif.jpg", (250, 10, 10), (10, 10, 250)),
    ("alpha.png", (250, 10, 10), (255, 255, 255)), ("float.tif", [255] * 3, [0] * 3),
    ("wide.tif", [255] * 3, [85] * 3), ("grey16.png imagej.tif", [233] * 3, [78] * 3)])
def test_images_are_read_as_a_viewer_shows_them(zoo, tmp_path, names, left, right):
    assert [train.as_seen(Image.new(m, (1, 1))).getextrema()[0][0] for m in ("F", "LA")] == [0, 255]
    for name in names.split():
        shutil.copy(zoo / name, tmp_path)
    images = sources(tmp_path)[1][[(0, i) for i in range(len(names.split()))]][0]
    for name, image in zip(sorted(names.split()), images, strict=True):
        off = 0 if name.endswith((".png", ".tif")) else 6  # the others lose something
        same(image[:, 16, [3, 28]].float(), torch.tensor([left, right]).T.float(), atol=off or 0.1)


def test_unreadable_files_are_named_once_and_replaced(zoo, tmp_path, capfd):
    main(*on_folder(zoo, tmp_path, batch_size=11, epochs=2, workers=1))
    said = [line for line in capfd.readouterr().err.splitlines() if "unreadable" in line]
    named = sorted(name for line in said for name in BROKEN if name in line)
    assert named == sorted(BROKEN * 2) and len(said) == 8  # in training and in evaluation
    bank = sources(zoo)[1]
    images = bank[[(0, i) for i in range(len(bank))]][0].float()
    assert len(bank) == 15 and images.std((1, 2, 3)).min() > 1  # none is blank


@pytest.mark.parametrize("good, bad, says", [
    (10, 10, None), (11, 11, "11 of 22"), (1189, 11, None), (1187, 13, "13 of 1200")])
def test_more_unreadable_files_than_a_hundredth_and_ten_stop_a_run(tmp_path, good, bad, says):
    names = *(f"{i}.bmp" for i in range(good)), *(f"bad{i}.jpg" for i in range(bad))
    bank = sources(touch(tmp_path, *names))[1]
    with pytest.raises(ma.UsageError, match=says) if says else contextlib.nullcontext():
        bank[[(0, i) for i in range(len(bank))]]


def test_a_line_is_cropped_before_it_is_resized(tmp_path, monkeypatch):
    """Otherwise it would have 1,300 million pixels."""
    Image.new("L", (20000, 1)).save(tmp_path / "line.png")
    Image.new("L", (1, 20000)).save(tmp_path / "column.png")
    sizes = spy(monkeypatch, Image.Image, "resize")
    for source in sources(tmp_path, (224, 224))[:2]:
        assert source[[(0, 0), (0, 1), (1, 0), (1, 1)]][0].shape == (4, 3, 224, 224)
    assert sizes and all(how[1:3] == ((224, 224), Image.BICUBIC) for how, _ in sizes)


def ramps(file, size=(120, 90)):
    """A picture that tells where a crop of it comes from: red grows to the right, green down."""
    red = torch.linspace(0, 255, size[0]).expand(size[1], -1)
    green = torch.linspace(0, 255, size[1])[:, None].expand(-1, size[0])
    Image.fromarray(torch.stack([red, green, 0 * red], 2).round().byte().numpy()).save(file)


def crops(root, task, size=(48, 48)):
    """600 training crops of the ramps."""
    touch(root, "train/a/0.png", "train/b/1.png")
    ramps(root / "train" / "a" / "0.png")
    source = sources(root, size, task=task)[0]
    return source[[(epoch, 0) for epoch in range(600)]][0].float()


@pytest.mark.parametrize("task, smallest, size", [
    ("pretrain", 0.2, (48, 48)), ("probe", 0.08, (48, 48)), ("pretrain", 0.2, (48, 64))])
def test_crops_have_the_recipes_area_and_aspect_ratio(tmp_path, task, smallest, size):
    images, (rows, columns) = crops(tmp_path, task, size), size
    red, green = images[:, 0, :, 8:-8].mean(1), images[:, 1, 8:-8].mean(2)
    width = (red[:, -1] - red[:, 0]) / 255 * columns / (columns - 17)
    height = (green[:, -1] - green[:, 0]) / 255 * rows / (rows - 17)
    area = width.abs() * height.abs()
    shape = width.abs() / height.abs() * 120 / 90 * rows / columns
    assert area.min() == pytest.approx(smallest, abs=0.04) and area.max() > 0.85
    assert 0.7 < shape.min() < 0.8 and 1.25 < shape.max() < 1.45
    assert 0.43 < (width < 0).float().mean() < 0.57 and (height > 0).all()


def test_fine_tuning_augments_more(tmp_path):
    """Pictures are turned bilinearly, and filled and erased with ImageNet's mean."""
    images = crops(tmp_path, "finetune")
    mean = (images == torch.tensor([124, 116, 104])[:, None, None]).all(1).float().mean((1, 2))
    assert 0.2 < (mean > 0.02).float().mean() < 0.7 and (images.sum(1) == 0).float().mean() < 0.01
    crop, _, rand, erase = sources(tmp_path, task="finetune")[0].augment.transforms[1:]
    assert crop.scale == (0.08, 1) and (rand.num_ops, rand.magnitude, erase.p) == (2, 9, 0.25)
    assert (crop.interpolation, rand.interpolation) == (Image.BICUBIC, Image.BILINEAR)


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    data, other = sources(folder, seed=1)[0], sources(folder, seed=2)[0]
    alone = {key: data[[key]][0][0] for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    torch.manual_seed(5)
    same([*data[[*alone][::-1]][0]], [*alone.values()][::-1])
    data.names[1] = data.names[0]  # the same picture
    assert len(data[[*alone]][0].unique(dim=0)) == 4
    assert not torch.equal(alone[0, 0], other[[(0, 0)]][0][0])
    for source in sources(folder)[1:]:  # bank and val are not augmented
        assert torch.equal(source[[(0, 3)]][0], source[[(1, 3)]][0])


@pytest.mark.parametrize("size", [(120, 90), (90, 120), (100, 100)])
def test_evaluation_sees_the_centre(tmp_path, size):
    """Of the shorter side 224/256, whatever the shape."""
    ramps(tmp_path / "0.png", size)
    image = sources(tmp_path, (56, 56))[1][[(0, 0)]][0][0].float()
    for ramp, side in ((image[0].mean(0), size[0]), (image[1].mean(1), size[1])):
        share = (ramp[50] - ramp[5]) / 255 * 56 / 45 * side / min(size)
        assert share.item() == pytest.approx(0.875, abs=0.02)
        assert ((ramp[0] + ramp[-1]) / 2).item() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("side, decoded", [(1000, 4), (500, 2), (200, 1), (40, 1)])
def test_large_jpegs_are_not_decoded_whole(tmp_path, monkeypatch, side, decoded):
    """But at least at four times the size that is asked for."""
    Image.new("RGB", (side, side)).save(tmp_path / "a.jpg")
    loads, found = set(), sources(tmp_path, (56, 56))
    monkeypatch.setattr(PIL.JpegImagePlugin.JpegImageFile, "load", lambda self: (
        loads.add(self.size), PIL.ImageFile.ImageFile.load(self))[1])
    for source in found[:2]:
        source[[(0, 0)]]
    assert loads == {(side // decoded, side // decoded)}


# --- Schedule ------------------------------------------------------------------------------------
@pytest.mark.parametrize("epochs, warmup, floor", [(1.34, 0, 0), (1, 1, 1e-6), (3.6, 1.4, 1e-7)])
def test_learning_rates_are_a_line_and_a_cosine(epochs, warmup, floor):
    schedule = train.Schedule(parse(*on_folder(
        "x", "out", epochs=epochs, warmup_epochs=warmup, min_lr=floor, blr=0.01)), 36)
    peak, steps, warm = 0.01 * 12 / 256, int(epochs * 3), int(warmup * 3)
    turns = [math.pi * (step + 1 - warm) / max(1, steps - warm) for step in range(steps)]
    assert [schedule.rate(step) for step in range(schedule.steps)] == pytest.approx([
        peak * (step + 1) / warm if step < warm else
        floor + (peak - floor) * (1 + math.cos(turns[step])) / 2 for step in range(steps)],
        rel=1e-9)


@pytest.mark.parametrize("epochs, count, batch, steps", [
    (200, 92, 10, 1840), (0.29, 100, 1, 29), (0.999, 100, 10, 9), (0.01, 9, 9, 1)])
def test_step_counts_are_exact(epochs, count, batch, steps):
    """Though 200 * (92 / 10) is 1839.99, and 0.29 * 100 is 28.99."""
    argv = flags(data="digits", epochs=epochs, batch_size=batch, warmup_epochs=epochs)
    schedule = train.Schedule(parse(*argv), count)
    assert schedule.steps == max(1, schedule.warmup) == steps


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(tmp_path, painted, hooks):
    seen = []
    hooks.before("MaskAlign")(lambda module, arguments: seen.append(which(arguments[0])))
    for seed in (1, 2):
        main(*on_folder(painted, tmp_path / str(seed), seed=seed, batch_size=8, epochs=2))
    assert torch.dist(*(weights(tmp_path / i)["patch_embed.proj.weight"] for i in "12")) > 1
    assert len({train.Schedule(parse("--seed", i), 9).noise(0, 1)[0][0].item() for i in "12"}) > 1
    images = sum(seen, [])  # twice 9 steps of 8: 2 epochs of 36
    assert [len(part) for part in seen] == [8] * 18
    orders = [tuple(images[at:at + 36]) for at in range(0, 144, 36)]
    assert all(sorted(order) == [*range(36)] for order in orders)
    assert len({*orders, tuple(range(36))}) == 5


@pytest.mark.parametrize("batch, most, parts", [
    (23, 16, [12, 11]), (12, 12, [12]), (12, 5, [4, 4, 4]), (10, 4, [4, 4, 2]), (7, 1, [1] * 7)])
def test_a_batch_is_split_evenly(tmp_path, painted, hooks, batch, most, parts):
    seen = []
    hooks.before("MaskAlign")(lambda module, arguments: seen.append(which(arguments[0])))
    main(*one_step(painted, tmp_path, batch_size=batch, micro_batch=most, epochs=1.1 * batch / 36))
    assert sorted(map(len, seen), reverse=True) == parts and len(set(sum(seen, []))) == batch


def gradient(*argv):
    """The first step's, flat, as the optimiser sees it; the run goes no further."""
    seen = []

    def look(optimiser, *_):
        seen.extend(p.grad.flatten() for group in optimiser.param_groups for p in group["params"])
        raise InterruptedError
    handle = register_optimizer_step_pre_hook(look)
    with contextlib.suppress(InterruptedError):
        main(*argv)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("data, more, off", [
    ("folder", dict(micro_batch=16), 1e-5), ("folder", dict(micro_batch=4), 1e-5),
    ("folder", dict(amp="fp16"), 0.05), ("folder", dict(amp="bf16"), 0.05),
    ("digits:96", dict(micro_batch=6), 1e-4)])  # fine-tuned; digits are not mixed
def test_gradients_are_those_of_the_batch(tmp_path, folder, hooks, data, more, off):
    hooks.before("ViT")(lambda *_: [torch.manual_seed(0)] and None)  # no noise is of torch's seed
    options = dict(task="finetune") if data == "digits:96" else dict(mask="random")
    argv = on_folder(folder if data == "folder" else data, tmp_path / "one", batch_size=23,
                     drop_path=0.3, warmup_epochs=0, **options)
    one, other = gradient(*argv), gradient(*argv, *flags(out=tmp_path / "other", **more))
    assert 0 < (one - other).norm() < off * one.norm()


# --- Model and optimiser -------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["pretrain", "finetune", "probe"])
def test_parameter_groups_are_a_partition_with_the_recipes_values(tmp_path, painted, hooks, task):
    """Each trainable parameter once, with the decay, rate and momentum of its kind and depth."""
    seen, group_of = [], {}
    hooks.before_step(lambda optimiser, *_: seen.append([*optimiser.param_groups]))
    run = trained(*one_step(painted, tmp_path, task=task, layer_decay=0.5, weight_decay=0.3,
                            blr=0.1, min_lr=0.1 * 12 / 256))
    for group in seen[0]:
        for parameter in group["params"]:
            assert id(parameter) not in group_of
            group_of[id(parameter)] = group
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert {id(p) for p in named.values()} == group_of.keys()
    exempt = {"pretrain": ["align.matrix"]}.get(task, ["student.pos_embed", "student.cls_token"])
    for name, parameter in named.items():
        group, (part, inner, *rest) = group_of[id(parameter)], name.split(".")
        assert group["weight_decay"] == (0 if parameter.ndim == 1 or name in exempt else 0.3)
        depth = 0 if part != "student" else 4 - int(rest[0]) if inner == "blocks" else 5
        assert group["lr"] == pytest.approx(0.1 * 12 / 256 * 0.5 ** depth)
        assert parameter.grad is None  # freed after the step
        assert part == "head" or task != "probe"
    assert {group.get("momentum", group.get("betas")) for group in seen[0]} == {
        dict(pretrain=(0.9, 0.95), finetune=(0.9, 0.999), probe=0.9)[task]}


def test_fine_tuning_trains_the_whole_encoder_and_a_probe_none_of_it(tmp_path, painted):
    before = torch.load(encoder_file(tmp_path))
    for task in ("finetune", "probe"):
        main(*on_folder(painted, tmp_path / task, task=task, init=tmp_path / "init.pt", epochs=1))
        head = last(tmp_path / task)["head"]
        assert head["weight"].abs().max() > 0 and head["bias"].abs().max() > 0
    same(weights(tmp_path / "probe"), before)
    after = weights(tmp_path / "finetune")
    still = {name.partition(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert still <= {"norm", "pos_embed"}  # timm's, which nothing reads; fixed sines


@pytest.mark.parametrize("probe", [False, True])
def test_a_classifier_reads_the_normalised_mean_patch_token(probe):
    student, images = ma.vit("vit_digits_patch4_32"), torch.rand(6, 3, 32, 32)
    tokens, dim = student(images)[-1][:, 1:].mean(dim=1), 1 - probe  # LayerNorm or BatchNorm
    model = train.Classifier(student, 5, probe)
    normed = (tokens - tokens.mean(dim, True)) / (
        tokens.var(dim, unbiased=False, keepdim=True) + 1e-5).sqrt()
    same(model(images), model.head(normed), atol=1e-4)
    assert 0.005 < model.head.weight.std() < 0.02


@pytest.mark.parametrize("text, size", [("48", (48, 48)), ("32x48", (32, 48))])
def test_flags_reach_model_and_teacher(tmp_path, painted, text, size):
    run = trained(*one_step(painted, tmp_path / "out", drop_path=0.3, mask="random", mask_ratio=0.4,
                            levels=2, image_size=text, init=encoder_file(tmp_path)))
    assert run.model.student.drop_path == pytest.approx(0.3) and run.teacher.levels == 2
    assert (run.model.mask, run.model.mask_ratio) == ("random", 0.4)
    assert run.model.student.image_size == run.teacher.image_size == run.sources[0].size == size
    patches = (size[0] // 4) * (size[1] // 4)  # the file's positions are resampled
    assert weights(tmp_path / "out")["pos_embed"].shape == (1, 1 + patches, 64)
    assert not run.teacher.training and run.record["step"] == 1


def test_fine_tuning_mixes_and_smooths_and_a_probe_does_not(tmp_path, hooks, monkeypatch):
    """Without augmentation black stays black, unless its label is half a white one's."""
    monkeypatch.setattr(train, "augmentation", lambda *a, f=train.augmentation: f(None, a[1]))
    data = touch(tmp_path / "data", *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(24)))
    for path in data.rglob("*.png"):
        Image.new("RGB", (60, 45), dict(a="black", b="white")[path.parent.name]).save(path)
    images, losses = [], spy(monkeypatch, torch.nn.functional, "cross_entropy")
    hooks.before("Classifier")(lambda _, arguments: images.append(arguments[0]))
    for task, smoothing in (("probe", 0), ("finetune", 0.1)):
        images.clear(), losses.clear()
        main(*on_folder(data, tmp_path / task, task=task, epochs=8, amp="bf16", micro_batch=6))
        labels = [arguments[1] for arguments, _ in losses]
        assert {options.get("label_smoothing", 0) for _, options in losses} == {smoothing}
        assert {(logits.dtype, each.dtype) for (logits, each), _ in losses} == {
            (torch.float32, torch.float32 if smoothing else torch.int64)}
    images, labels = torch.cat(images), torch.cat(labels)
    assert len(set(labels.flatten().round(decimals=4).tolist())) > 40  # 16 steps, two parts each
    same(labels.sum(1), torch.ones(192), atol=1e-5)
    mixes = train.mixing(sources(data)[0], parse("--data", data, "--task", "finetune"))
    assert [(type(mix), mix.alpha) for mix in mixes.transforms] == [(v2.MixUp, 0.8), (v2.CutMix, 1)]
    mixed, black = (labels[:, 0] - 0.5).abs() < 0.2, images.flatten(1).amax(1) == 0
    assert images.max() <= 1 and black[labels[:, 0] > 0.999].all() and mixed.sum() > 20
    assert black[mixed].float().mean() < 0.25


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16),
                                        ("off", torch.float32)])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_precision_is_that_of_amp_in_training_evaluation_and_teacher(
        tmp_path, painted, hooks, task, amp, dtype):
    student, teacher = set(), set()

    def look(module, arguments, output):
        if module.cls_token.requires_grad:
            student.add((module.training, torch.get_autocast_dtype("cpu")
                         if torch.is_autocast_enabled("cpu") else torch.float32))
        else:
            teacher.update(x.dtype for x in (module.cls_token, *output))
    hooks.after("ViT")(look)
    main(*one_step(painted, tmp_path, task=task, amp=amp))
    assert student - {(False, torch.float32)} == {(True, dtype), (False, dtype)} - {
        (False, torch.float32)}  # which look.png's are
    assert teacher == ({dtype} if task == "pretrain" else set())


# --- Evaluation ----------------------------------------------------------------------------------
def features(encoder, source):
    """As neighbours are found: the mean patch token of the last level, whitened, of length 1."""
    x = encoder(source[[(0, i) for i in range(len(source))]][0])[-1][:, 1:].mean(dim=1)
    x = (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x / x.norm(dim=1, keepdim=True)


def test_knn_is_the_vote_by_loops():
    def encoder(images):  # the first channel is the [CLS] token, the others are two patches
        x = images.float().flatten(2)
        x[:, 0] = 3 * (255 - x[:, 1])
        return [x.sqrt(), x]
    bank, val = (train.Digits(count, (32, 32), count, True) for count in (240, 410))
    right = 0
    for i, row in enumerate((features(encoder, val) @ features(encoder, bank).T).tolist()):
        votes = [0] * 10
        for j in sorted(range(240), key=lambda j: -row[j])[:20]:
            votes[j % 10] += math.exp(row[j] / 0.07)
        right += votes.index(max(votes)) == i % 10
    found = train.knn(encoder, bank, val, parse("--workers", 0, "--device", "cpu"))
    assert found == pytest.approx(100 * right / 410)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_knn_votes_in_fp32_at_any_precision_and_shows_a_bar(tmp_path, painted, monkeypatch, amp):
    """In fp16 e^(1 / 0.07) would be infinite."""
    nearest, votes = (spy(monkeypatch, torch.Tensor, name) for name in ("topk", "exp"))
    bars = spy(monkeypatch, train, "tqdm")
    main(*one_step(painted, tmp_path, amp=amp, micro_batch=4))
    assert {arguments[0].dtype for arguments, _ in nearest + votes} == {torch.float32}
    assert {9, 2} <= {options["total"] for _, options in bars if not options["disable"]}  # by 4
    assert (4, 36) in {arguments[0].shape for arguments, _ in nearest}  # val, and train's


def test_mutual_knn_is_the_overlap_by_loops():
    torch.manual_seed(0)
    student, teacher = (lambda images, p=torch.randn(1024, 24): [
        (images.float()[:, :1].flatten(2) @ p).expand(-1, 3, -1)] for _ in range(2))
    source, near = train.Digits(51, (32, 32), 1, True), []
    for network in (student, teacher):
        x = features(network, source)
        near.append([{*sorted(range(51), key=lambda j: -row[j])[:21]} - {i}
                     for i, row in enumerate((x @ x.T).tolist())])
    expected = 100 * sum(len(a & b) for a, b in zip(*near)) / (51 * 20)
    args = parse(*flags(workers=0, device="cpu", micro_batch=7))
    seen, both = [], lambda images: (seen.append(len(images)) or teacher(images), None)
    assert train.mutual_knn(student, both, source, args) == pytest.approx(expected, abs=0.2)
    several = [train.Digits(count, (32, 32), 1, True) for count in (1, 51, 2001)]
    assert [train.mutual_knn(teacher, both, each, args) for each in several] == [0, 100, 100]
    assert 41 < expected < 90 and sum(seen) == 51 + 1 + 51 + 1001  # every second of 2001


@given(st.integers(0, 99))
def test_components_are_uncorrelated_and_agree_in_sign(seed):
    torch.manual_seed(seed)
    tokens = torch.randn(2, 30, 7) * torch.tensor([9, 7, 5, 1, 1, 1, 1.0]) + torch.arange(7)
    mine = train.components(tokens)
    same(mine.flatten(0, 1).T.cov(), torch.eye(3), atol=1e-3)
    turned, scaled = mine * torch.tensor([-1.0, 1, -1]), tokens * (1 + torch.rand(2, 30, 1))
    same(train.components(scaled, like=turned + 0.1 * torch.randn(2, 30, 3)), turned, atol=1e-3)


def test_look_shows_image_attention_mask_and_components(tmp_path, painted):
    """In five rows, in the file and by the function, without labels, too."""
    run = trained(*on_folder(painted / "train" / "a", tmp_path, epochs=2, eval_every=1))
    assert all(0 <= each <= 100 for each in logged(tmp_path, "mutual_knn") if each is not None)
    assert [*run.record].count("knn") == 0 and run.record["mutual_knn"] > 0
    sheet = torch.tensor(numpy.array(Image.open(tmp_path / "look.png"))).permute(2, 0, 1)
    assert sheet.shape[1:] == (5 * 34 + 2, 8 * 34 + 2)  # save_image's frame
    bank = run.sources[1]
    images, _ = bank[[(0, i * (len(bank) - 1) // 7) for i in range(8)]]
    same(torch.stack([sheet[:, 2:34, 2 + 34 * i:34 + 34 * i] for i in range(8)]), images)
    sheet = train.look(run.model.eval(), run.teacher, images)
    picture, light, visible, mine, theirs = sheet.chunk(5)
    same(picture, images / 255)
    patch = torch.nn.functional.max_pool2d(visible.amax(1), 4)
    assert (patch.flatten(1) > 0).sum(1).tolist() == [19] * 8  # of 64 patches
    kept = torch.nn.functional.interpolate((patch > 0).float()[:, None], scale_factor=4)
    same(visible, picture * kept)
    attention = run.teacher(images)[1].unflatten(1, (8, 8))
    same(light[:, 0, ::4, ::4], attention / attention.amax((1, 2), keepdim=True), atol=1e-6)
    expected = train.components(run.teacher(images)[0][-1][:, 1:])
    same(theirs[:, :, ::4, ::4].flatten(2).mT, (0.5 + expected / 4).clamp(0, 1), atol=1e-5)
    expected = train.components(run.model.student(images)[-1][:, 1:], like=expected)
    same(mine[:, :, ::4, ::4].flatten(2).mT, (0.5 + expected / 4).clamp(0, 1), atol=1e-4)


@pytest.mark.parametrize("task", ["pretrain", "finetune", "probe"])
def test_no_epochs_evaluate_alone(tmp_path, painted, task):
    """An encoder without its teacher, also on another folder, with the run's own results."""
    run = trained(*on_folder(painted, tmp_path / "run", task=task, epochs=1, blr=0.1))
    shutil.copytree(painted, tmp_path / "other")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for i, name in enumerate(["student.pt" if task == "pretrain" else "classifier.pt", "last.pt"]):
        argv = on_folder(tmp_path / "other", tmp_path / f"{i}", task=task, epochs=0,
                         init=tmp_path / "run" / name, teacher="none")
        assert trained(*argv) is None
        [record] = map(json.loads, (tmp_path / f"{i}" / "log.jsonl").read_text().splitlines())
        for key in {"knn", "top1", "top5"} & run.record.keys():
            assert record[key] == run.record[key]
    main(*on_folder(painted, tmp_path / "run", task=task, epochs=0))
    assert logged(tmp_path / "run")[-1] == 0
    assert before == (tmp_path / "run" / "last.pt").read_bytes()


@pytest.mark.parametrize("files, options, says", [
    ("train/a/0.png train/b/1.png val/a/2.png", dict(task="probe"), "no head for the classes"),
    ("train/a/0.png train/b/1.png", {}, "no val/"), ("0.png", {}, "no val/"),
    ("train/a/0.png train/b/1.png val/a/2.png", dict(init="nowhere.pt"), "nowhere.pt"),
    ("train/x/0.png train/y/1.png val/x/2.png", dict(task="probe", init="last.pt"), "no head")])
def test_nothing_to_evaluate_ends_in_one_line(tmp_path, finished, files, options, says):
    init = dict(init=finished["probe"].out / options.get("init", "student.pt"))
    data = touch(tmp_path / "data", *files.split())
    assert says in refused(*on_folder(data, tmp_path / "out", **options | init, epochs=0))
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_classifier_can_start_another_with_its_head(tmp_path, painted, finished, capsys):
    out = finished["probe"].out
    begun = trained(*one_step(painted, tmp_path, task="probe", init=out / "classifier.pt", blr=0))
    assert "its head is used" in capsys.readouterr().out
    same(begun.model.head.state_dict(), last(out)["head"], atol=1e-6)


KNN = """
import train
import torch.distributed as dist
sent, gather = [0], dist.all_gather_object
dist.all_gather_object = lambda ranks, mine: gather(ranks, sent.append(mine.numel()) or mine)
if "RANK" in os.environ:
    dist.init_process_group("gloo")
project = torch.randn(96, 2000, generator=torch.Generator().manual_seed(0))
def encoder(images):  # two patches, whose mean is 2000 features
    seen.append(len(images))
    return [(images.float().flatten(1)[:, :96] @ project)[:, None].expand(-1, 3, -1)]
args = train.parse(["--micro-batch", "3", "--batch-size", "6", "--device", "cpu"])
for banked, asked in ((200, 31), (2, 2), (1, 1), (7, 40), (50, 4), (50, 5), (50, 7)):
    bank, val = train.Digits(banked, (16, 16), 1, True), train.Digits(asked, (16, 16), 2, True)
    seen = []
    print("found", train.knn(encoder, bank, val, args), sum(seen), max(sent))
raise SystemExit
"""


def test_ranks_share_knn_and_none_holds_the_whole_bank():
    ranks = [*start(first=KNN), *start(first=KNN, ranks=3)]
    found = [re.findall(r"found (\S+) (\d+) (\d+)", rank.wait().out) for rank in ranks]
    accuracies = [[float(right) for right, _, _ in each] for each in found]
    assert len(accuracies[0]) == 7 and 10 < accuracies[0][0] < 100
    assert all(each == pytest.approx(accuracies[0]) for each in accuracies)
    for (_, seen, sent), *_ in found[1:]:  # of 200 + 31 images of 2000 features
        assert int(seen) <= 67 + 11 and int(sent) <= 11 * 2000


@pytest.mark.parametrize("task, name, options", [("pretrain", "student.pt", dict(num_classes=0)),
    ("finetune", "classifier.pt", dict(num_classes=2, global_pool="avg"))])
def test_files_load_strictly_into_timm_and_are_the_model(tmp_path, painted, task, name, options):
    run = trained(*on_folder(painted, tmp_path, task=task, blr=0.01, epochs=2))
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64,
                                depth=4, num_heads=4, **options).eval()
    network.load_state_dict(torch.load(tmp_path / name))
    images, labels = run.sources[2][[(0, i) for i in range(5)]]
    content, ours, theirs = last(tmp_path), run.model.eval(), network
    if task == "pretrain":
        student, theirs = run.model.student, network.forward_features
        ours = lambda images: student.norm(student(images)[-1])
    with torch.no_grad():
        logits = theirs(ma.normalise(images, *IMAGENET))
        same(logits, ours(images), atol=1e-5)
    if task == "finetune":
        right = 100 * (logits.argmax(1) == labels).float().mean().item()
        assert run.record["top1"] == pytest.approx(right) and run.record["top5"] == 100
        assert ours.fc_norm.eps == network.fc_norm.eps
        assert (tmp_path / "classes.txt").read_text().split() == ["a", "b"]
    assert content["classes"] == ["a", "b"] and content.keys() - run.model._modules.keys() == {
        "optimiser", "scaler", "step", "evaluated", "log", "arguments", "classes"}
    assert (tmp_path / "classifier.pt").exists() == (task == "finetune")


def test_ranks_share_an_evaluation_in_which_each_image_counts_once(tmp_path):
    data = touch(tmp_path / "data", *(f"{split}/{i % 9}/{i}.png" for split in ("train", "val")
                                      for i in range(28)))
    argv = on_folder(data, tmp_path / "1", task="finetune", blr=1e-9, min_lr=0, epochs=1)
    run(*argv, "--out", tmp_path / "3", ranks=3)
    one = trained(*argv)
    images, labels = one.sources[2][[(0, i) for i in range(28)]]
    with torch.no_grad():
        ranking = one.model.eval()(images).argsort(dim=1, descending=True)
    hits = 100 * (ranking == labels[:, None]).float().mean(0).cumsum(0)
    for out in ("1", "3"):
        assert logged(tmp_path / out, "top1") == pytest.approx([hits[0].item()], abs=0.01)
        assert logged(tmp_path / out, "top5") == pytest.approx([hits[4].item()], abs=0.01)
    assert hits[0] < hits[4] < 100


@pytest.mark.parametrize("every, saves, steps", [
    (2, 1, [6, 12]), (2, 4, [8, 12]), (0.5, 1, [2, 3, 5, 6, 8, 9, 11, 12]), (0, 1, [12]),
    (3, 4, [10, 12])])
def test_evaluation_is_due_every_so_many_epochs(tmp_path, painted, hooks, every, saves, steps):
    """Of 3 steps, at the next line of the log, and at the end; of what is saved already."""
    modes, evaluated = [], []
    hooks.before("MaskAlign")(lambda module, _: modes.append(module.training))
    hooks.before("ViT")(lambda module, _: module.cls_token.requires_grad and evaluated.append(
        saved(tmp_path) if not (module.training or torch.is_grad_enabled()) else "trained") or None)
    main(*on_folder(painted, tmp_path, eval_every=every, save_every=saves, epochs=4))
    records = zip(logged(tmp_path), logged(tmp_path, "knn"))
    assert [step for step, knn in records if knn is not None] == steps
    assert modes == [True] * 12 and {*evaluated} == {"trained", *steps}
    assert len(evaluated) - 2 * len(steps) >= evaluated.count("trained") == 12  # bank and val


# --- Checkpoints ---------------------------------------------------------------------------------
COUNT = """
import warnings
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
exchanged, hooked = [], []
def exchange(_, bucket):
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)
def watch(module, arguments):
    if hasattr(module, "register_comm_hook") and not hooked:
        hooked.append(module.register_comm_hook(None, exchange))
before_forward(watch)
atexit.register(lambda: print("exchanged", len(exchanged), len(set(exchanged))))
warnings.simplefilter("always", ResourceWarning)
"""


@pytest.fixture(scope="session")
def undisturbed(folder, zoo, painted, tmp_path_factory):
    """By task and ranks: a command, and what it ends with if nothing disturbs it."""
    root, found = tmp_path_factory.mktemp("undisturbed"), {}
    wild = touch(root / "wild", f"train/a->{zoo}", f"train/b->{painted}/train/b")
    for task, ranks, data, more in (("pretrain", 1, folder, {}), ("pretrain", 2, folder, {}),
            ("pretrain", 3, folder, dict(micro_batch=12)), ("finetune", 1, wild, {}),
            *(("probe", ranks, folder, dict(init=encoder_file(tmp_path_factory.mktemp("init"))))
              for ranks in (1, 2))):
        out = root / f"{task}{ranks}"
        argv = on_folder(data, out, **dict(
            task=task, save_every=5, micro_batch=3, drop_path=0.3) | more)
        job = QUEUE.submit(run, *argv, ranks=ranks, first=COUNT)
        found[task, ranks] = SimpleNamespace(
            argv=argv, out=out, result=job.result, init=more.get("init", out))
    return found


def test_ranks_exchange_gradients_once_a_step_and_change_nothing(undisturbed):
    """With and without accumulation: one, two and three processes end alike."""
    one, *others = (undisturbed["pretrain", ranks] for ranks in (1, 2, 3))
    assert "ResourceWarning" not in one.result()[0].err  # the log is closed
    for many in others:
        calls, buckets = re.search(r"exchanged (\d+) (\d+)", many.result()[0].out).groups()
        assert int(calls) == 12 * int(buckets) > 0
        same(weights(one.out), weights(many.out), atol=2e-4)
        for key in ("step", "epoch", "loss", "lr", "grad_norm"):
            assert logged(one.out, key) == pytest.approx(logged(many.out, key), rel=1e-3)
        assert logged(one.out, "knn")[-1] == pytest.approx(logged(many.out, "knn")[-1], abs=9)


def terminated(where):
    """Lines for Child: it is terminated at the first forward pass for which this holds."""
    return f"""
def stop(module, _):
    if {where}:
        os.kill(os.getpid(), signal.SIGTERM)
before_forward(stop)
"""


TORN = """
def save(content, file, whole=torch.save, written=[]):
    written.append("last.pt" in str(file))
    if written[-1] and sum(written) == 2:
        file.write(b"a part of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(content, file)
torch.save = save
"""
LATE = """
def tell(ranks, mine, whole=torch.distributed.all_gather_object, told=[]):
    whole(ranks, mine)
    told.append(type(mine) is int)  # a signal, or 0: when step 0 is saved, then step 5
    if told[-1] and sum(told) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
torch.distributed.all_gather_object = tell
"""
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, [1_500_000] * 2)"


CUTS = {  # task, ranks, ranks that go on; what happens, the exit code, and the step of last.pt
    "killed": ("pretrain", 1, 1, signalled(7), -9, 5),
    "killed while it saves": ("pretrain", 1, 1, TORN, -9, 0),
    "full disk": ("pretrain", 1, 1, FULL, 2, 0),
    "two killed, one goes on": ("pretrain", 2, 1, signalled(7), -9, 5),
    "killed probe": ("probe", 2, 2, signalled(7), -9, 5),
    "Ctrl-C": ("pretrain", 1, 1, signalled(7, "SIGINT"), 130, 7),
    "Ctrl-C twice": ("pretrain", 1, 1, signalled(7, "SIGINT", times=2), 130, 5),
    "terminated twice": ("probe", 1, 1, signalled(7, "SIGTERM", times=2), 143, 7),
    "one rank of two signalled": ("pretrain", 2, 2, signalled(7, "SIGUSR1", rank=1), 138, 10),
    "signalled when the ranks have agreed to go on": ("pretrain", 2, 2, LATE, 143, 10),
    "at the beginning": ("pretrain", 1, 1, terminated("True"), 143, 0),
    "in evaluation": ("pretrain", 1, 1, terminated(
        "hasattr(module, 'blocks') and not module.training and module.cls_token.requires_grad"),
        143, 10)}


@pytest.mark.parametrize("cut", CUTS)
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, undisturbed, cut):
    """Bit for bit at the same number of ranks: weights, optimiser and, but for a line, the log."""
    task, ranks, then, first, code, step = CUTS[cut]
    whole = undisturbed[task, ranks]
    argv, whole_said = (*whole.argv, "--out", tmp_path), whole.result()
    ended = run(*argv, ranks=ranks, first=first, code=code)
    assert saved(tmp_path) == step and logged(tmp_path) == [5] * (step > 0)
    assert state(tmp_path)["last.pt"]["evaluated"] == 0
    assert code <= 2 or f"last.pt is of step {step};" in one_line(ended[0].err)
    with open(tmp_path / "log.jsonl", "a") as file:  # as if killed before the checkpoint
        file.write('{"step": 175, "loss": 0}\n{"step": 18')
    assert not any("train.py:" in rank.err for rank in ended[1:])
    whole.init.is_file() and whole.init.unlink()  # --init is read once
    done = run(*argv, ranks=then)
    assert f"from {step}," in done[0].out and "left aside" not in done[0].out
    assert sum(rank.out.count("left aside") for rank in whole_said) == (task == "probe")
    assert logged(tmp_path) == sorted({5, 10, 12, step} - {0}) and saved(tmp_path) == 12
    same(weights(whole.out), weights(tmp_path), atol=2e-4)
    if then == ranks:
        contents = state(whole.out), state(tmp_path)
        for content in contents if step == 7 else ():
            content["last.pt"].pop("log")
        same(*contents)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_change_nothing_and_may_be_killed(tmp_path, undisturbed):
    """In a folder with broken files. The script trains once, though workers import it."""
    whole = undisturbed["finetune", 1]
    argv = (*whole.argv, "--out", tmp_path, "--workers", 2)
    run(*argv, code=1, first=at_step(7, """
        for worker in children(os.getpid()):
            os.kill(int(worker), signal.SIGKILL)"""))
    assert saved(tmp_path) == 5
    [done] = run(*argv, code=143, first=at_step(2, "os.system('kill 0'), time.sleep(1)"))
    assert saved(tmp_path) == 7 and "step 7;" in one_line(done.err)  # a terminal's, to all
    [done] = run(*argv)
    assert done.out.count("finetune:") == 1 and all(name in done.err for name in BROKEN)
    whole.result()
    ours, theirs = state(tmp_path), state(whole.out)
    assert [each["last.pt"].pop("log")[-1]["step"] for each in (ours, theirs)] == [11] * 2
    same(theirs, ours)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_process_and_no_shared_memory(tmp_path, folder):
    before = {*os.listdir("/dev/shm")}
    [child] = start(*on_folder(folder, tmp_path, workers=2), first=at_step(3, """
        print(*children(os.getpid()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""))
    done = child.wait(-9, reap=False)
    left, until = done.out.splitlines()[-1].split(), time.monotonic() + 10
    assert len(left) >= 2
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = [pid for pid in left if Path(f"/proc/{pid}/exe").exists()]
        left += {*os.listdir("/dev/shm")} - before
    assert not left


@pytest.fixture(scope="session")
def torchrun(undisturbed, tmp_path_factory):
    """torchrun --max-restarts 1: rank 1 is killed after step 7; after the restart from step 5, in
    step 8, rank 0 has torchrun terminated."""
    out = tmp_path_factory.mktemp("torchrun") / "out"
    script = out.parent / "script.py"
    script.write_text("import os, signal, time\nfrom torch.optim.optimizer import "
                      "register_optimizer_step_post_hook as after_step\n" +
                      at_step("(7, 3)[int(os.environ['TORCHELASTIC_RESTART_COUNT'])]", """
        os.write(1, f"process {os.getpid()}\\n".encode())  # in one piece: both ranks write here
        life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
        if (life, rank) == ("0", "1"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (life, rank) == ("1", "0"):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(3)""") + f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import train; train.main()")
    argv = (*undisturbed["pretrain", 2].argv, "--out", out)
    job = QUEUE.submit(run, "--nproc_per_node", 2, "--master_port", free_port(), "--max-restarts",
                       1, script, *argv, code=1, script=torch.distributed.run.__file__)
    return SimpleNamespace(argv=argv, out=out, result=job.result)


def test_torchrun_restarts_after_a_killed_rank_and_stops_at_a_signal(torchrun, undisturbed):
    """With all its processes; the same command goes on. The end is as if nothing had happened."""
    said, whole = torchrun.result()[0].out, undisturbed["pretrain", 2]
    processes = re.findall(r"process (\d+)", said)
    assert "from 0," in said and "from 5," in said and 3 <= len(processes) <= 4
    assert saved(torchrun.out) == 10  # where the ranks agreed
    assert not any(Path(f"/proc/{process}/exe").exists() for process in processes)
    run(*torchrun.argv, ranks=2)
    whole.result()
    same(state(whole.out), state(torchrun.out))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, painted):
    """By task, a run of 3 steps and its command."""
    found = {}
    for task in ("pretrain", "probe"):
        out = tmp_path_factory.mktemp("finished") / "deeper" / "out"
        argv = on_folder(painted, out, task=task, epochs=1, warmup_epochs=0.4)
        main(*argv)
        found[task] = SimpleNamespace(out=out, argv=argv)
    return found


@pytest.mark.parametrize("damage, argv, says", [
    *((None, (flag, value), ["last.pt", flag[2:], str(value), str(now)]) for flag, value, now in (
        ("--seed", 1, 0), ("--levels", 2, 3), ("--mask", "random", "attentive"),
        ("--mask-ratio", 0.6, 0.7), ("--batch-size", 6, 12), ("--blr", 1, 0.00015),
        ("--min-lr", 1, 1e-5), ("--warmup-epochs", 0, 0.4), ("--weight-decay", 0, 0.05),
        ("--drop-path", 0, 0.1), ("--layer-decay", 0.5, 1), ("--image-size", 32, "(32, 32)"),
        ("--amp", "bf16", "off"), ("--task", "probe", "pretrain"), ("--epochs", 0.5, 1))),
    (lambda path: touch(path.parents[1] / "data", "train/a/new.png"), (), ["--data", "36", "37"]),
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), (), ["last.pt"]),
    (lambda path: path.write_bytes(b""), (), ["last.pt"]),
    (lambda path: path.write_bytes((old := path.read_bytes())[:9999] + b"?" + old[10000:]), (),
     ["last.pt"]),
    (lambda path: torch.save({"model": {}}, path), (), ["last.pt"]),  # of another program
    (lambda path: path.unlink(), (), ["log.jsonl", "--out"])])
def test_a_checkpoint_that_does_not_fit_is_named_and_kept(
        tmp_path, painted, finished, damage, argv, says):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(finished["pretrain"].out, out), data.symlink_to(painted)
    if damage:
        data.unlink(), shutil.copytree(painted, data)
        damage(out / "last.pt")
    before = [path.read_bytes() for path in out.glob("last.pt")]
    error = refused(*finished["pretrain"].argv, "--data", data, "--out", out, *argv)
    assert all(word.replace("-", "_") in error.replace("-", "_") for word in says), error
    assert before == [path.read_bytes() for path in out.glob("last.pt")]
    assert not argv or "start anew" in error


def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path, painted, finished, capsys):
    """With other flags that do not matter, in a folder that was moved."""
    out = shutil.copytree(finished["pretrain"].out, tmp_path / "out")
    (out / "look.png").unlink()
    argv = (*finished["pretrain"].argv, *flags(data=f"{painted}/.", out=out,
        micro_batch=5, save_every=7, eval_every=9, no_compile=True, amp="off"))
    main(*argv)  # does not evaluate again
    assert "finished" in capsys.readouterr().out and not (out / "look.png").exists()
    assert logged(out) == [3] and train.stop.saved == f"{out}/last.pt is of step 3"
    main(*argv, "--epochs", 2)
    said = capsys.readouterr().out
    assert "from 3," in said and "finished" not in said and saved(out) == 6
    assert all(count in said for count in ("36 images", "2 classes", "5 to evaluate"))
    assert logged(out) == [3, 6] and logged(out, "lr")[-1] == pytest.approx(1e-5)


def test_a_teacher_file_may_have_moved_and_init_be_gone(tmp_path, painted, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = on_folder(painted, tmp_path / "out", epochs=1)
    main(*argv, *flags(teacher_weights=encoder_file(tmp_path), init=tmp_path / "init.pt"))
    touch(tmp_path, "moved/x.txt", "another.pt->init.pt"), shutil.copy("init.pt", "moved")
    for path in ("./init.pt", "moved/init.pt"):
        main(*argv, *flags(teacher_weights=path))
        assert "finished" in capsys.readouterr().out
    assert "another.pt" in refused(*argv, *flags(teacher_weights="another.pt"))


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, painted, monkeypatch):
    synced, replaced, fsync, replace = set(), {}, os.fsync, os.replace

    def look(source, target):
        replaced[Path(target).name] = os.stat(source).st_ino, os.stat(source).st_size
        assert replaced[Path(target).name] in synced
        replace(source, target)
    monkeypatch.setattr(os, "fsync", lambda fd: (
        synced.add((os.fstat(fd).st_ino, os.fstat(fd).st_size)), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", look)
    main(*one_step(painted, tmp_path))
    assert [*replaced] == ["student.pt", "last.pt"]  # the last one vouches for the others


def test_a_second_run_is_refused_and_a_folder_without_locks_is_not(tmp_path, painted, monkeypatch):
    with train.owned(tmp_path):
        assert "in use by another run" in refused(*one_step(painted, tmp_path))
    for i, error in enumerate((NotImplementedError(), OSError(errno.ENOLCK, ""), OSError())):
        monkeypatch.setattr(filelock.FileLock, "acquire", fail(error))
        main(*one_step(painted, tmp_path / str(i)))


# --- The loop ------------------------------------------------------------------------------------
def test_an_obvious_loop_has_the_same_losses(tmp_path, folder, hooks, monkeypatch):
    """One image at a time, one optimiser, the paper's schedule; the images, which patches of them
    are visible, and the first weights are the run's."""
    teacher, steps, first = encoder_file(tmp_path), [], {}

    def look(model, arguments):
        steps.append([arguments[0]])
        if not first:
            first.update({name: x.clone() for name, x in model.state_dict().items()})
    hooks.before("MaskAlign")(look)
    draw = ma.attentive_keep
    monkeypatch.setattr(ma, "attentive_keep", lambda *by: (
        steps[-1].append(draw(*by)), steps[-1][1])[1])
    main(*on_folder(folder, tmp_path / "out", epochs=2, warmup_epochs=0.7, micro_batch=4,
                    drop_path=0, weight_decay=0.3, blr=0.01, min_lr=1e-5, save_every=1,
                    teacher_weights=teacher))
    rows = [tuple(sorted(row)) for part in steps for row in part[1].tolist()]
    assert len(rows) == 72 == len(set(rows)) and {len(row) for row in rows} == {19}
    teacher = ma.load_teacher("vit_digits_patch4_32", teacher, 3)
    model = ma.MaskAlign(ma.vit("vit_digits_patch4_32"), teacher)
    model.load_state_dict(first)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW([dict(params=[p for name, p in parameters.items()
                if (p.ndim > 1 and name != "align.matrix") == decays],
        weight_decay=0.3 * decays) for decays in (True, False)], betas=(0.9, 0.95))
    peak, losses, rates = 0.01 * 12 / 256, [], []
    for step in range(6):
        optimiser.zero_grad()
        loss = sum(model(image[None], *teacher(image[None]), keep=kept[None])
                   for part in steps[3 * step:3 * step + 3] for image, kept in zip(*part[:2])) / 12
        loss.backward()
        rates.append(peak * (step + 1) / 2 if step < 2 else
                     1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * (step - 1) / 4)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = rates[-1]
        optimiser.step()
        losses.append(loss.item())
    for key, values in dict(loss=losses, lr=rates, epoch=[(1 + i) / 3 for i in range(6)]).items():
        assert logged(tmp_path / "out", key) == pytest.approx(values, rel=1e-4)
    same(weights(tmp_path / "out"), model.student.state_dict(), atol=2e-4)


def test_the_log_has_mean_loss_median_norm_and_speed(tmp_path, painted, hooks, monkeypatch):
    """Every ten steps, and where the run is saved. A picture takes 0.02 s to open, however fast the
    rest of it is on this machine."""
    losses, norms, began, opened = [], [], time.monotonic(), Image.open
    hooks.after("MaskAlign")(lambda module, arguments, output: losses.append(output.item()))
    hooks.before_step(lambda optimiser, *_: norms.append(torch.cat([
        p.grad.flatten() for group in optimiser.param_groups for p in group["params"]]).norm()))
    monkeypatch.setattr(Image, "open", lambda *names: (time.sleep(0.02), opened(*names))[1])
    main(*on_folder(painted, tmp_path, save_every=4, blr=0.05, eval_every=100))
    parts = [slice(0, 4), slice(4, 8), slice(8, 10), slice(10, 12)]
    assert logged(tmp_path) == [4, 8, 10, 12]
    assert logged(tmp_path, "loss") == pytest.approx(
        [sum(losses[part]) / len(losses[part]) for part in parts], rel=1e-5)
    assert logged(tmp_path, "grad_norm") == pytest.approx(
        [torch.stack(norms[part]).median().item() for part in parts], rel=1e-4)
    speeds, waits = logged(tmp_path, "images_per_s"), logged(tmp_path, "data_wait")
    seconds = sum(12 * n / v for n, v in zip((4, 4, 2, 2), speeds))
    assert 144 * 0.02 < seconds < time.monotonic() - began
    assert all(v < 50 and 0.02 <= wait / v and wait < 1 for v, wait in zip(speeds, waits))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0]).keys() == {
        "step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait"}


@pytest.fixture(scope="session")
def compiled(painted, tmp_path_factory):
    argv = on_folder(painted, tmp_path_factory.mktemp("compiled"), compile=True, epochs=3)
    return QUEUE.submit(run, *argv, first="""
import functools
torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
torch._dynamo.config.error_on_recompile = True
""" + at_step(9, "print('graphs:', torch._dynamo.utils.counters['stats']['unique_graphs'])"))


def test_teacher_and_model_are_one_graph_each_compiled_once(compiled):
    """With an evaluation in between; a small backend stands for the compiler's."""
    assert "graphs: 2" in compiled.result()[0].out


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_for_the_gpu_only_where_it_logs(tmp_path, painted, amp):
    """Of 27 steps, in the 20 after those that compile; in a process that has no threads yet."""
    argv = on_folder(painted, tmp_path, device="cuda", amp=amp, epochs=9, micro_batch=6)
    subprocess.run([sys.executable, "-c", """
import torch, train
from torch.optim.optimizer import register_optimizer_step_post_hook
train.LOG_EVERY, steps = 100, []
register_optimizer_step_post_hook(lambda *_: (
    steps.append(1), torch.cuda.set_sync_debug_mode("error" if 4 <= len(steps) < 24 else 0)))
train.main()""", *map(str, argv), "--eval-every", "100"], cwd=HERE, check=True)
    assert saved(tmp_path) == 27
    assert {x.device.type for x in torch.load(tmp_path / "student.pt").values()} == {"cpu"}


# --- Faults --------------------------------------------------------------------------------------
def spoilt(how, rank):
    """Lines for Child: something happens after the forward pass of step 3 on one rank."""
    return f"""
steps = []
after_step(lambda optimiser, *_: steps.append(print("weights", sum(
    p.double().abs().sum() for group in optimiser.param_groups for p in group["params"]).item())))
def spoil(module, arguments, output):
    if type(module).__name__ == "MaskAlign" and len(steps) == 2:
        if os.environ.get("RANK", "0") == "{rank}":
            print("seen", *(arguments[0][:, 0].double().mean((1, 2)) / 7).round().int().tolist())
            {how}
torch.nn.modules.module.register_module_forward_hook(spoil)
"""


@pytest.mark.parametrize("ranks, amp, how", [
    (1, "off", "return output + float('inf')"),  # though the gradient would be finite
    (1, "bf16", "output.register_hook(lambda grad: grad * float('nan'))"),  # though the loss is
    (2, "off", "return output + float('inf')")])
def test_no_step_is_taken_with_what_is_not_finite(tmp_path, painted, ranks, amp, how):
    argv = on_folder(painted, tmp_path, save_every=2, micro_batch=3, workers=2 - ranks, amp=amp)
    for done in run(*argv, ranks=ranks, code=2, first=spoilt(how, ranks - 1)):  # ends its workers
        error = one_line(done.err)
        assert "step 3" in error and f"rank {ranks - 1}" in error
        assert float(re.search(r"lr (\S+?)[,;: ]", error)[1]) == pytest.approx(
            1.5e-4 * 12 / 256, rel=0.01)
        sums = re.findall("weights (.*)", done.out)
        assert [a == b for a, b in zip(sums, sums[1:])] == [False, True, False]
    seen = re.findall(r"\d+", "".join(re.findall("seen(.*)", done.out)))
    assert sorted(seen) == sorted(re.findall(r"(\d+)\.png", error)) and len(seen) == 12 // ranks
    assert saved(tmp_path) == 2 and logged(tmp_path) == [2]
    assert last(tmp_path)["scaler"]["growth_interval"] > 1e9


@pytest.mark.parametrize("task, skipped", [
    ("pretrain", lambda step: step % 4 == 1 or 9 < step < 20), ("probe", lambda step: step == 0),
    ("pretrain", lambda step: step > 1)], ids=["half", "first", "all"])
def test_fp16_may_skip_steps_but_not_all(tmp_path, painted, hooks, task, skipped):
    """Gradients may overflow while its scale adapts: such a step is not taken, and no error; its
    norm is not in the log, which stays JSON."""
    heads = []

    def overflow(module, arguments, output):
        if module.training:
            if skipped(len(heads)):
                output.register_hook(lambda grad: grad + math.inf)
            heads.append([x.detach().clone() for x in module.parameters()][-1])
    hooks.after("MaskAlign")(overflow), hooks.after("Classifier")(overflow)
    argv = on_folder(painted, tmp_path, task=task, amp="fp16", batch_size=4, epochs=3)
    if all_skipped := skipped(2) and skipped(3):
        assert "non-finite" in refused(*argv)
    else:
        main(*argv)
    assert [torch.equal(a, b) for a, b in zip(heads, heads[1:])] == [
        bool(skipped(step)) for step in range(len(heads) - 1)]
    assert saved(tmp_path) == (0 if all_skipped else 27)
    assert all(0 < norm < 1e6 for norm in logged(tmp_path, "grad_norm") if norm is not None)
    content = last(tmp_path)
    assert all(x.isfinite().all() for part in ("student", "align", "head") if part in content
               for x in content[part].values())


def fail(error):
    def raise_it(*arguments, **options):
        raise error
    return raise_it


@pytest.mark.parametrize("task, workers, begin, says", [
    *((task, 0, lambda case: case.hooks.before("Block")(fail(torch.OutOfMemoryError("9 GiB"))),
       "--micro-batch.* 5.*9 GiB") for task in ("pretrain", "probe")),
    ("pretrain", 1, lambda case: case.patch(shutil, "disk_usage", lambda path: SimpleNamespace(
        free=30719)), "/dev/shm.*--workers.*--micro-batch.*--shm-size"),
    ("pretrain", 0, lambda case: case.patch(torch, "save", fail(RuntimeError("a\nb"))), "pt.* a b"),
    ("pretrain", 0, lambda case: case.hooks.after_step(lambda *_: shutil.rmtree(
        case.out, ignore_errors=True)), "out")])
def test_faults_end_in_one_line(tmp_path, painted, hooks, monkeypatch, task, workers, begin, says):
    begin(SimpleNamespace(out=tmp_path / "out", hooks=hooks, patch=monkeypatch.setattr))
    argv = one_step(painted, tmp_path / "out", task=task, micro_batch=5, workers=workers)
    assert re.search(says, refused(*argv)) and saved(tmp_path / "out") <= 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
@pytest.mark.parametrize("name", ["log.jsonl", "look.png"])
def test_a_run_goes_on_without_log_or_picture(tmp_path, finished, name):
    shutil.copytree(finished["pretrain"].out, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=f"{name} was not written") as said:
        main(*finished["pretrain"].argv, *flags(out=tmp_path / "out", epochs=2))
    assert saved(tmp_path / "out") == 6 and last(tmp_path / "out")["log"][-1]["mutual_knn"] > 0
    assert len({str(each.message) for each in said if name in str(each.message)}) == 1


def test_evaluation_keeps_no_files_open(tmp_path):
    """With workers, at a limit of descriptors, as many micro-batches as that."""
    touch(tmp_path / "data", "train/b/0.png", *(
        f"{split}/a/{i}.png" for split in ("train", "val") for i in range(99)))
    argv = one_step(tmp_path / "data", tmp_path / "out", workers=1, micro_batch=1, batch_size=2,
                    epochs=0.02)
    run(*argv, first="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, [90] * 2)")


# --- Entry ---------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Two ranks; rank 0's disk is slow."""
    out = tmp_path_factory.mktemp("demo")
    argv = flags(epochs=0.01, blr=0.1, micro_batch=16, device="cpu", image_size="16x24", out=out,
                 init=encoder_file(out))
    return out, argv, QUEUE.submit(run, *argv, ranks=2, first="""
if os.environ["RANK"] == "0":
    save = torch.save
    torch.save = lambda *what, **how: (time.sleep(0 if how else 0.7), save(*what, **how))
taught = []
def look(module, arguments):
    if type(module).__name__ == "Teacher" and not taught:
        taught.append(print("taught by", module.network.cls_token.double().sum().item()))
before_forward(look)""")


def test_demo_trains_teacher_and_student_with_its_flags(demo, monkeypatch):
    """The second lesson waits for the first one's file; --init is the student's alone."""
    out, argv, job = demo
    said, other = ranks = [rank.out for rank in job.result()]
    teacher = torch.load(out / "teacher" / "student.pt")["cls_token"].double().sum().item()
    assert [re.findall("taught by (.*)", said) for said in ranks] == [[str(teacher)]] * 2
    assert said.count("of 64 = 2 processes x 2 x 16") == 2 and said.count("left aside") == 1
    assert [logged(out / part)[-1] for part in ("teacher", "student")] == [5, 7]
    names, shown = zip(*re.findall(r"((?:un)?trained student|teacher) (\d+\.\d) %[,\n]", said))
    assert names == ("untrained student", "trained student") * 2 + ("teacher",)
    assert other.count("\n") < 2
    monkeypatch.setattr(train.Digits, "read", functools.cache(train.Digits.read))
    _, bank, val = train.open_data(args := parse(*argv), (16, 24))
    student, teacher = (ma.load_teacher(args.student, out / name / "student.pt", 3, (4, 6))
                        for name in ("student", "teacher"))
    torch.manual_seed(args.seed)
    encoders = [ma.vit(args.student, image_size=args.image_size), lambda x: student(x)[0],
                lambda x: teacher(x)[0]]
    expected = [train.mutual_knn(encoder, teacher, bank, args) for encoder in encoders[:2]]
    expected += [train.knn(encoder, bank, val, args) for encoder in encoders]
    assert [*map(float, shown)] == pytest.approx(expected, abs=0.4)  # votes may be even
    assert Image.open(out / "student" / "look.png").size == (8 * 26 + 2, 5 * 18 + 2)


def test_another_task_on_digits_is_no_demo(tmp_path):
    main("--data", "digits:64", "--task", "probe", "--device", "cpu", "--out", tmp_path)
    assert saved(tmp_path) == 1 and not (tmp_path / "teacher").exists()
    assert "none/last.pt was not read" in refused("--epochs", 0, "--out", tmp_path / "none")


# --- The tutorial --------------------------------------------------------------------------------
def make_coco(root):
    """Four images a split in COCO's format, of two classes with odd ids, one crowd among them."""
    for split in ("train2017", "val2017"):
        names = [f"{index:012}.jpg" for index in range(4)]
        touch(root / split, *names)
        things = [dict(id=2 * i, image_id=100 + i, category_id=(7, 90)[i % 2], iscrowd=0, area=1,
                       bbox=[9 * i, 8, 10, 20], segmentation=[[9 * i, 8, 9 * i + 10, 8, 9 * i + 10,
                                                               28, 9 * i, 28]]) for i in range(4)]
        crowd = things[3] | dict(id=99, iscrowd=1, segmentation=dict(counts="", size=[45, 60]))
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(dict(
            images=[dict(id=100 + i, file_name=names[i], width=60, height=45) for i in range(4)],
            annotations=[*things, crowd],
            categories=[dict(id=7, name="disc"), dict(id=90, name="square")])))


def run_notebook(home, constants):
    """Run the tutorial in a folder that holds the two files -> its outputs' text and figures."""
    for name in ("maskalign.py", "train.py"):
        shutil.copy(HERE / name, home)
    subprocess.run([sys.executable, "-c", f"""
import nbclient, nbformat
book = nbformat.read({str(HERE / "tutorial.ipynb")!r}, 4)
nbclient.NotebookClient(book, timeout=500, kernel_name="python3").execute()
nbformat.write(book, "done.ipynb")"""], cwd=home, check=True,
        env=os.environ | dict(LENGTH="0.01", REPEATS="1") | constants)
    cells = nbformat.read(home / "done.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return ("".join(output.get("text", "") for output in outputs),
            sum("image/png" in output.get("data", {}) for output in outputs))


@pytest.fixture(scope="session")
def tutorials(tmp_path_factory):
    """In short, on digits and COCO-format images, and on ten folders where Imagenette would lie."""
    root = tmp_path_factory.mktemp("tutorial")
    digits, photographs = homes = root / "digits", root / "photographs"
    make_coco(root / "coco"), digits.mkdir()
    touch(photographs / "data" / "imagenette2-320", *(
        f"{split}/n0{label}/{label}_{i}.JPEG" for i in range(7) for label in (
            "1440764 2102040 2979186 3000684 3028079 3394916 3417042 3425413 3445777 "
            "3888257".split())
        for split in (["train"] if i < 4 else ["val"])))
    constants = dict(COCO=str(root / "coco")), dict(
        DATA="imagenette", LEVELS="3", STUDENT="vit_digits_patch4_32",
        TEACHER="vit_digits_patch4_32 random")
    return [(home, QUEUE.submit(run_notebook, home, each)) for home, each in zip(homes, constants)]


def test_tutorial_is_committed_as_one_run_and_prints_the_code_as_it_stands():
    cells = [cell for cell in nbformat.read(HERE / "tutorial.ipynb", 4).cells
             if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell.source.splitlines()) <= 20 for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(json.dumps(outputs)) < 2e6
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 16
    assert not re.search(r"/(tmp|root|home|work)/", "".join(o.get("text", "") for o in outputs))
    printed = [(found[1], cell.outputs[0].text) for cell in cells
               if (found := re.fullmatch(r"source\(([\w.]+)\)", cell.source))]
    assert len(printed) >= 3
    for name, text in printed:
        thing = functools.reduce(getattr, name.split("."), ma)
        assert text.strip() == textwrap.dedent(inspect.getsource(thing)).strip(), name


def test_tutorial_runs(tutorials):
    """By a real kernel, in a folder that holds nothing else."""
    (digits, job), (photographs, other) = tutorials
    text, figures = job.result()
    scores = re.search(r"COCO format: AP of boxes ([\d.]+), of masks ([\d.]+)", text)
    assert figures >= 16 and scores and all(0 <= float(ap) <= 100 for ap in scores.groups())
    assert {path.name for path in digits.iterdir()} - {"__pycache__", "done.ipynb"} == {
        "maskalign.py", "train.py"}
    text, figures = other.result()
    assert figures >= 14 and ("'classes': 10" in text or "10 classes" in text)
    assert "golf ball" in (photographs / "done.ipynb").read_text()
    assert not (photographs / "data" / "imagenette2-320.tgz").exists()  # nothing was downloaded


# --- The house -----------------------------------------------------------------------------------
README = (HERE / "README.md").read_text()


def test_readme_points_at_what_is_there():
    lines = (HERE / "maskalign.py").read_text().splitlines()
    rows = re.findall(r"\| `(\w+)` \| (\d+) \|", README)
    assert len(rows) >= 10
    for name, number in rows:
        assert re.match(rf"(class|def) {name}\b", lines[int(number) - 1]), name
    titles = [title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)]
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or link[1:] in titles or (HERE / link).exists(), link


def test_commands_of_the_readme_and_of_the_header_are_valid():
    commands = re.findall(r"^    .*\btrain\.py ?([^#|\n]*)", README + train.__doc__, re.M)
    assert len(commands) >= 12
    for command in commands:
        assert parse(*command.split()).student in ma.VITS


def test_teachers_of_the_readme_exist():
    rows = re.findall(r"^\| (?:CLIP|DINO|SigLIP|MAE|your)[^|]*\|(.*)$", README, re.M)
    names = {name for row in rows for name in re.findall(r"`([\w.-]+)[ `]", row)}
    assert len(names) >= 12
    assert names <= {*timm.list_models(), *timm.list_pretrained(), *open_clip.list_models()}


def test_readme_snippets_run_and_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classifier = train.Classifier(ma.vit("vit_tiny_patch16_224"), 3, probe=False).eval()
    for path, content in (("pre/student.pt", classifier.student.state_dict()),
                          ("tune/classifier.pt", classifier.timm_state())):
        Path(path).parent.mkdir()
        torch.save(content, path)
    Path("tune/classes.txt").write_text("ant\nbee\ncat\n")
    Image.effect_noise((224, 224), 80).convert("RGB").save("cat.jpg")
    code, found = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S)), {}
    exec(code.replace("vit_base_", "vit_tiny_"), found)
    same(found["patches"], found["features"][:, 1:], atol=1e-4)
    same(found["cls"], found["features"][:, :1], atol=1e-4)
    assert Image.open("attention.png").size == (224, 224)
    hub = timm.create_model("local-dir:hub", pretrained=True, num_classes=0)
    assert tuple(hub.pretrained_cfg["mean"]) == IMAGENET[0]
    same(hub.norm.bias, classifier.student.norm.bias)


def test_size_and_density():
    """Blank lines, comments and docstrings are no code."""
    kinds, total = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER", 0
    free = {getattr(tokenize, kind) for kind in kinds.split()}
    for name in ("maskalign.py", "train.py"):
        text = (HERE / name).read_text()
        lines, nodes = text.splitlines(), [*ast.walk(ast.parse(text))]
        code = {line for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type not in free for line in range(token.start[0], token.end[0] + 1)}
        for node in nodes:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                code -= {*range(node.lineno, node.end_lineno + 1)}
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 60
        assert len(nodes) / len(code) <= 13 and max(map(len, lines)) <= 100, name
        assert sum(len(lines[line - 1]) > 90 for line in code) <= len(code) / 10
        total += len(code)
    assert int(re.search(r"(\d+) lines of\s+code together", README)[1]) == total
